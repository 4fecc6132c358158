"""The scheduler's table, case by case; tests/control/test_scheduler_properties.py has its invariants."""

from __future__ import annotations

from itertools import pairwise

import pytest

from app.control.scheduler import MAX_PLANS_PER_MESSAGE, MESSAGE_S, StepScheduler
from app.messages.plans import FIRST_DIGEST, StepPlan, plan_digest
from app.settings import MagCacheSettings, SamplingSettings, Settings
from tests.control.scheduling import DEV_PLANNER, FLUX_DEV, ON, Clock, drain, rows_at_once, submit
from tests.local_group import job

ROW = 64 + 32
"""Tokens of one branch of an image of 128x128."""
NARROW = Settings(
    magcache=MagCacheSettings(profile="flux.1-dev"),
    sampling=SamplingSettings(max_side=128, max_pixels=128 * 128),
    max_batch_tokens=2 * ROW,
)
"""Two such branches compute in a step."""


def stepping(plans: list[StepPlan]) -> list[list[str]]:
    return [[row.row_id for row in plan.rows] for plan in plans]


def test_first_come_first_served_up_to_the_limit() -> None:
    scheduler = StepScheduler(rows_at_once(2), clock=Clock())
    submit(scheduler, job("a/0", steps=2), job("b/0", steps=4), job("c/0", steps=1))
    formed = drain(scheduler)
    assert stepping(formed) == [["a/0", "b/0"], ["a/0", "b/0"], ["b/0", "c/0"], ["b/0"]]
    assert [[one.row_id for one in plan.admit] for plan in formed] == [["a/0", "b/0"], [], ["c/0"], []]
    assert [row.row_id for plan in formed for row in plan.rows if row.last] == ["a/0", "c/0", "b/0"]
    assert scheduler.empty


@pytest.mark.parametrize(
    ("first", "second", "waited_s", "order"),
    [
        ({}, {}, 1, "ab"),
        ({}, {"priority": 1}, 1, "ba"),
        ({"priority": 1}, {"priority": 2}, 1, "ba"),
        ({}, {"priority": 1}, 61, "ab"),  # aged: patience_s is 60
        ({}, {"priority": 2}, 61, "ba"),
        ({}, {"deadline_s": 20.0}, 1, "ba"),
        ({"deadline_s": 30.0}, {"deadline_s": 20.0}, 1, "ba"),
        ({"deadline_s": 30.0}, {"deadline_s": 30.0}, 1, "ab"),
        ({}, {"deadline_s": 500.0}, 1, "ab"),  # a deadline far away is no reason to wait longer
        ({"deadline_s": 5.0}, {"priority": 1}, 1, "ba"),
        ({}, {"deadline_s": 20.0}, 41, "ab"),
    ],
)
def test_priority_then_deadline_then_arrival_and_age_overtakes(first, second, waited_s, order) -> None:
    clock = Clock()
    scheduler = StepScheduler(rows_at_once(1), clock=clock)
    submit(scheduler, job("a/0", steps=1, **first))
    clock.now_s = waited_s if "deadline_s" not in first else min(waited_s, 1)
    (second_entry,) = submit(scheduler, job("b/0", steps=1, **second))
    assert scheduler.position(second_entry) == order.index("b") + 1
    assert stepping(drain(scheduler)) == [[f"{name}/0"] for name in order]


def test_rows_reuse_ahead_and_compute_together() -> None:
    """CCC..C...C.C.....C.....C..C. computes nine times, each beside a step of a row that computes always."""
    scheduler = StepScheduler(FLUX_DEV)
    submit(scheduler, job("a/0", magcache=ON), job("b/0", steps=9))
    formed = drain(scheduler)
    computing = [plan for plan in formed if _computed(plan)]
    assert stepping(computing) == 9 * [["a/0", "b/0"]]
    assert stepping([plan for plan in formed if not _computed(plan)]) == 19 * [["a/0"]]
    marks = "".join("C" if _computed(plan) else "." for plan in formed)
    assert marks == DEV_PLANNER.schedules(job("a/0", magcache=ON))["cond"].text


def test_what_reuses_costs_nothing_and_waits_for_nobody() -> None:
    """Two rows fill a step that computes, whatever they reuse in between; c joins when b leaves."""
    scheduler = StepScheduler(NARROW)
    submit(scheduler, job("a/0", magcache=ON), job("b/0", steps=5), job("c/0", steps=2))
    formed = drain(scheduler)
    assert all(_computed(plan) <= 2 for plan in formed)
    computing = [rows for plan, rows in zip(formed, stepping(formed), strict=True) if _computed(plan)]
    assert computing == 5 * [["a/0", "b/0"]] + 2 * [["a/0", "c/0"]] + 2 * [["a/0"]]
    assert all(rows == ["a/0"] for plan, rows in zip(formed, stepping(formed), strict=True) if not _computed(plan))


def test_a_row_that_leaves_a_step_to_others_takes_the_next_that_computes() -> None:
    scheduler = StepScheduler(NARROW, clock=Clock())
    submit(scheduler, job("a/0", magcache=ON), job("b/0", magcache=ON))
    scheduler.next_plan()
    submit(scheduler, job("c/0", magcache=ON, priority=1))
    taken: dict[str, list[int]] = {}
    for round_, plan in enumerate(plan for plan in drain(scheduler) if _computed(plan)):
        for row in plan.rows:
            taken.setdefault(row.row_id, []).append(round_)
    gaps = {row_id: {b - a for a, b in pairwise(rounds)} for row_id, rounds in taken.items()}
    assert gaps["c/0"] == {1}
    assert gaps["a/0"] == gaps["b/0"] == {1, 2}


def test_an_urgent_newcomer_steps_before_rows_under_way() -> None:
    scheduler = StepScheduler(NARROW, clock=Clock())
    submit(scheduler, job("a/0", steps=4), job("b/0", steps=4))
    scheduler.next_plan()
    submit(scheduler, job("c/0", steps=2, priority=1))
    # b leaves c its step, and takes its own before a in the next.
    assert stepping(drain(scheduler)) == [["c/0", "a/0"], ["c/0", "b/0"], ["a/0", "b/0"], ["a/0", "b/0"]]


def test_each_branch_follows_its_own_schedule() -> None:
    scheduler = StepScheduler(rows_at_once(1))
    submit(scheduler, job("a/0", magcache=ON, true_cfg_scale=2.0))
    formed = drain(scheduler)
    for index, branch in enumerate(("cond", "uncond")):
        steps = [plan.rows[0].branches[index] for plan in formed]
        assert {step.branch for step in steps} == {branch}
        assert "".join("C" if step.compute else "." for step in steps) == "CCC..C...C.C.....C.....C..C."


def test_digests_chain_over_everything_that_ranks_do() -> None:
    scheduler = StepScheduler(rows_at_once(2))
    submit(scheduler, job("a/0", steps=5), job("b/0", steps=3))
    digest = FIRST_DIGEST
    for sequence, plan in enumerate(drain(scheduler)):
        assert plan.sequence == sequence
        digest = plan_digest(digest, plan)
        assert plan.digest == digest


def test_cancelling_waiting_running_finished_and_unknown() -> None:
    scheduler = StepScheduler(rows_at_once(1))
    submit(scheduler, job("a/0", steps=3), job("b/0", steps=1), job("c/0", steps=1))
    scheduler.next_plan()
    assert scheduler.cancel("b/0")  # waiting: ranks never hear of it
    assert scheduler.cancel("a/0")  # running: the next plan drops it
    plan = scheduler.next_plan()
    assert plan is not None
    assert plan.drop == ("a/0",)
    assert [row.row_id for row in plan.rows] == ["c/0"]
    assert not scheduler.cancel("c/0")
    assert not scheduler.cancel("z/0")
    assert scheduler.next_plan() is None


def test_a_cancellation_alone_makes_a_plan() -> None:
    scheduler = StepScheduler(rows_at_once(1))
    submit(scheduler, job("a/0", steps=3))
    scheduler.next_plan()
    scheduler.cancel("a/0")
    plan = scheduler.next_plan()
    assert plan is not None
    assert (plan.drop, plan.rows) == (("a/0",), ())
    assert scheduler.next_plan() is None


def test_a_deadline_that_passes_ends_a_image_waiting_or_running() -> None:
    clock = Clock()
    scheduler = StepScheduler(rows_at_once(1), clock=clock)
    submit(scheduler, job("a/0", steps=9, deadline_s=2.0), job("b/0", deadline_s=2.5), job("c/0", steps=1))
    scheduler.next_plan()
    clock.now_s = 2.5
    plan = scheduler.next_plan()
    assert plan is not None
    assert plan.drop == ("a/0",)
    assert [row.row_id for row in plan.rows] == ["c/0"]
    assert [entry.job.row_id for entry in scheduler.take_too_late()] == ["a/0", "b/0"]
    assert scheduler.take_too_late() == []
    assert scheduler.empty


@pytest.mark.parametrize(
    ("computed_s", "expected"),
    [
        (MESSAGE_S, ["C", "C", "C..", "C...", "C.", "C..p", "..C.....", "C..", "C."]),
        (0.6 * MESSAGE_S, ["CC", "C..C...", "C.C..p", "..C.....C..", "C."]),
        (0.0, ["CCC..C...C.C..p", "..C.....C..C."]),
    ],
)
def test_a_message_ends_with_enough_work_or_what_is_waited_for(computed_s: float, expected: list[str]) -> None:
    scheduler = StepScheduler(FLUX_DEV)
    submit(scheduler, job("a/0", magcache=ON, partial_images=1))

    def seconds_of(plan: StepPlan) -> float:
        return computed_s * any(branch.compute for row in plan.rows for branch in row.branches)

    messages = list(iter(lambda: scheduler.next_message(seconds_of), ()))
    marks = [
        "".join(
            "C" if row.branches[0].compute else "p" if row.preview else "." for plan in message for row in plan.rows
        )
        for message in messages
    ]
    assert marks == expected
    assert max(len(message) for message in messages) <= MAX_PLANS_PER_MESSAGE


def _computed(plan: StepPlan) -> int:
    return sum(part.compute for row in plan.rows for part in row.branches)
