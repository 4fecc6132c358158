"""The scheduler's table, case by case; tests/control/test_scheduler_properties.py has its invariants."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest

from app.control.schedule import SchedulePlanner
from app.control.scheduler import MAX_PLANS_PER_MESSAGE, MESSAGE_S, StepScheduler
from app.engine.sampling import FlowMatchSampler
from app.messages import (
    FIRST_DIGEST,
    BranchStep,
    DenoiseJob,
    MagCacheOptions,
    RowStep,
    StepPlan,
    plan_digest,
)
from app.settings import MagCacheSettings, SamplingSettings, Settings
from tests.local_group import MODEL, job

ON = MagCacheOptions(True)
FLUX_DEV = Settings(magcache=MagCacheSettings(profile="flux.1-dev"))
PLANNER = SchedulePlanner(FLUX_DEV, FlowMatchSampler(MODEL))
ROW = 64 + 32
"""Tokens of one branch of an image of 128x128."""
NARROW = Settings(
    magcache=MagCacheSettings(profile="flux.1-dev"),
    sampling=SamplingSettings(max_side=128, max_pixels=128 * 128),
    max_batch_tokens=2 * ROW,
)
"""Two such branches compute in a step."""


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def rows_at_once(rows: int) -> Settings:
    return FLUX_DEV.model_copy(update={"max_batch_rows": rows})


def submit(scheduler: StepScheduler, *jobs: DenoiseJob):
    return [scheduler.submit(one, PLANNER.schedules(one)) for one in jobs]


def drain(scheduler: StepScheduler) -> list[StepPlan]:
    return list(iter(scheduler.next_plan, None))


def stepping(plans: list[StepPlan]) -> list[list[str]]:
    return [[row.row_id for row in plan.rows] for plan in plans]


@pytest.mark.parametrize(
    ("profile", "steps", "options", "schedule"),
    [
        ("flux.1-dev", 28, ON, "CCC..C...C.C.....C.....C..C."),
        ("flux.1-dev", 50, ON, "CCCCC.C..C...C...C..C.....C.....C.....C.....C..C.."),
        ("flux.1-dev-vllm-omni", 28, ON, "CCC..C...C....C.....C.....C."),
        ("flux.1-dev", 28, MagCacheOptions(False), "C" * 28),
        # The curve has ratios of exactly 1, which no threshold forbids.
        ("flux.1-dev", 28, MagCacheOptions(True, mag_threshold=0.0), "CCCCCCCCCCCCCC.C.C..CCCCCCCC"),
        ("flux.1-dev", 28, MagCacheOptions(True, mag_max_skip_steps=0), "C" * 28),
        ("flux.1-dev", 28, MagCacheOptions(True, mag_retention_ratio=1.0), "C" * 28),
    ],
)
def test_trajectories_follow_the_profile_and_the_request(profile, steps, options, schedule) -> None:
    planner = SchedulePlanner(Settings(magcache=MagCacheSettings(profile=profile)), FlowMatchSampler(MODEL))
    both = planner.schedules(job("a/0", steps=steps, magcache=options, true_cfg_scale=2.0))
    assert {name: schedule.text for name, schedule in both.items()} == {"cond": schedule, "uncond": schedule}
    assert both["cond"].residuals_kept == (1 if "." in schedule else 0)


def test_image_to_image_follows_the_end_of_the_curve() -> None:
    late = PLANNER.schedules(job("a/0", strength=0.5, magcache=ON))["cond"]
    assert late.text == "C.....C.....C."  # of 28 steps the last 14; the curve's beginning would be CCC..C...
    assert [decision.step for decision in late.decisions] == list(range(14))


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
    assert marks == PLANNER.schedules(job("a/0", magcache=ON))["cond"].text


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


def test_a_digest_depends_on_every_field() -> None:
    branch = BranchStep("cond", False, (0.5,), 2)
    row = RowStep("a/0", 3, (branch,), True, False)
    plan = StepPlan(1, "", (job("a/0"),), (row,), ("b/0",))
    others = {
        BranchStep: {"branch": "uncond", "compute": True, "weights": (0.25,), "residuals_kept": 1},
        RowStep: {"row_id": "c/0", "step": 4, "branches": (branch, branch), "last": False, "preview": True}
        | {"move": (0.5,), "estimate": (0.25,)},
        StepPlan: {"sequence": 2, "admit": (job("a/0", seed=8),), "rows": (), "drop": ()},
    }
    for message, values in others.items():
        assert set(values) == {field.name for field in fields(message)} - {"digest"}
    altered = [replace(plan, **{name: value}) for name, value in others[StepPlan].items()]
    altered += [replace(plan, rows=(replace(row, **{name: value}),)) for name, value in others[RowStep].items()]
    altered += [
        replace(plan, rows=(replace(row, branches=(replace(branch, **{name: value}),)),))
        for name, value in others[BranchStep].items()
    ]
    digests = {plan_digest(FIRST_DIGEST, one) for one in [plan, *altered]}
    assert len(digests) == 1 + len(altered)
    assert plan_digest("1" * 16, plan) not in digests


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


@pytest.mark.parametrize(
    ("steps", "previews", "at"), [(28, 3, {7, 14, 21}), (28, 1, {14}), (2, 3, {0}), (1, 1, set()), (28, 0, set())]
)
def test_previews_are_spread_evenly(steps: int, previews: int, at: set[int]) -> None:
    scheduler = StepScheduler(FLUX_DEV)
    submit(scheduler, job("a/0", steps=steps, partial_images=previews))
    assert {row.step for plan in drain(scheduler) for row in plan.rows if row.preview} == at


def test_reports_give_seconds() -> None:
    clock = Clock()
    scheduler = StepScheduler(rows_at_once(2), clock=clock)
    (entry,) = submit(scheduler, job("a/0", steps=4, magcache=ON))
    clock.now_s = 1.5
    scheduler.next_plan()
    submit(scheduler, job("b/0", steps=9))
    drain(scheduler)
    report = entry.report(finished_s=4.0)
    assert (report.queue_seconds, report.denoise_seconds) == (1.5, 2.5)
    assert report.computed + report.skipped == len(report.schedule) == 4
    assert report.negative_schedule is None


def _computed(plan: StepPlan) -> int:
    return sum(part.compute for row in plan.rows for part in row.branches)
