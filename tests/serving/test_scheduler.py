from __future__ import annotations

import pytest

from app.engine.messages import FIRST_DIGEST, MagCacheOptions, StepPlan, plan_digest
from app.engine.sampling import FlowMatchSampler
from app.serving.scheduler import StepScheduler
from app.serving.trajectory import TrajectoryPlanner
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL, job

PLANNER = TrajectoryPlanner(Settings(magcache=MagCacheSettings(profile="flux.1-dev")), FlowMatchSampler(MODEL))
ON = MagCacheOptions(True)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def submit(scheduler: StepScheduler, *jobs):
    return [scheduler.submit(one, PLANNER.trajectories(one)) for one in jobs]


def drain(scheduler: StepScheduler) -> list[StepPlan]:
    return list(iter(scheduler.next_plan, None))


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
    planner = TrajectoryPlanner(Settings(magcache=MagCacheSettings(profile=profile)), FlowMatchSampler(MODEL))
    both = planner.trajectories(job("a/0", steps=steps, magcache=options, true_cfg_scale=2.0))
    assert {name: trajectory.schedule for name, trajectory in both.items()} == {"cond": schedule, "uncond": schedule}
    assert both["cond"].history == (1 if "." in schedule else 0)


def test_first_come_first_served_up_to_the_limit() -> None:
    scheduler = StepScheduler(max_batch_rows=2)
    submit(scheduler, job("a/0", steps=2), job("b/0", steps=4), job("c/0", steps=1))
    formed = drain(scheduler)
    assert [[row.row_id for row in plan.rows] for plan in formed] == [
        ["a/0", "b/0"], ["a/0", "b/0"], ["b/0", "c/0"], ["b/0"],
    ]  # fmt: skip
    assert [[one.row_id for one in plan.admit] for plan in formed] == [["a/0", "b/0"], [], ["c/0"], []]
    assert [row.row_id for plan in formed for row in plan.rows if row.last] == ["a/0", "c/0", "b/0"]
    assert scheduler.running == scheduler.waiting == 0


def test_each_branch_follows_its_own_schedule() -> None:
    scheduler = StepScheduler(max_batch_rows=1)
    submit(scheduler, job("a/0", magcache=ON, true_cfg_scale=2.0))
    formed = drain(scheduler)
    for index, branch in enumerate(("cond", "uncond")):
        steps = [plan.rows[0].branches[index] for plan in formed]
        assert {step.branch for step in steps} == {branch}
        assert "".join("C" if step.compute else "." for step in steps) == "CCC..C...C.C.....C.....C..C."


def test_digests_chain_over_everything_that_ranks_do() -> None:
    scheduler = StepScheduler(max_batch_rows=2)
    submit(scheduler, job("a/0", steps=5), job("b/0", steps=3))
    digest = FIRST_DIGEST
    for sequence, plan in enumerate(drain(scheduler)):
        assert plan.sequence == sequence
        digest = plan_digest(digest, plan)
        assert plan.digest == digest


def test_cancelling_waiting_running_finished_and_unknown() -> None:
    scheduler = StepScheduler(max_batch_rows=1)
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
    scheduler = StepScheduler(max_batch_rows=1)
    submit(scheduler, job("a/0", steps=3))
    scheduler.next_plan()
    scheduler.cancel("a/0")
    plan = scheduler.next_plan()
    assert plan is not None
    assert (plan.drop, plan.rows) == (("a/0",), ())
    assert scheduler.next_plan() is None


def test_reports_give_seconds_and_mean_batch() -> None:
    clock = Clock()
    scheduler = StepScheduler(max_batch_rows=2, clock=clock)
    (entry,) = submit(scheduler, job("a/0", steps=4, magcache=ON))
    clock.now_s = 1.5
    scheduler.next_plan()
    submit(scheduler, job("b/0", steps=9))
    drain(scheduler)
    report = entry.report(finished_s=4.0)
    assert (report.queue_seconds, report.denoise_seconds) == (1.5, 2.5)
    assert report.batch_rows_mean == (1 + 2 + 2 + 2) / 4
    assert report.computed + report.skipped == len(report.schedule) == 4
    assert report.negative_schedule is None
