"""One image in the table: where its previews are, and what its report says."""

from __future__ import annotations

import pytest

from app.control.scheduler import StepScheduler
from tests.control.scheduling import FLUX_DEV, ON, Clock, drain, rows_at_once, submit
from tests.local_group import job


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
