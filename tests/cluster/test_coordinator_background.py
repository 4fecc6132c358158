"""A calibration's rows at the coordinator, with a real rank in this process: clients first, and the sums come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from app.messages.calibration import CalibrationRun
from app.messages.conditioning import Conditioning
from app.messages.plans import StepPlan
from app.messages.results import StepResult
from tests.cluster.test_coordinator import Group, conditioning, group

__all__ = ["conditioning", "group"]

STEPS = 8
RECORD = CalibrationRun("C" * STEPS, record=True)


class PlanLog:
    """What the coordinator sends to the rank, from now on.

    Attributes:
        done: the plans that the rank has done.
        ahead: by message in the background, the messages before it that the rank had not done when it was sent.
    """

    def __init__(self, group: Group) -> None:
        self.done: list[StepPlan] = []
        self.ahead: list[int] = []
        self._call = group.coordinator._ranks[0].execute
        self._under_way = 0
        group.coordinator._ranks[0].execute = self

    def remote(self, plans: Sequence[StepPlan], *tensors: Conditioning) -> asyncio.Future[list[StepResult]]:
        if plans[0].background:
            self.ahead.append(self._under_way)
        self._under_way += 1
        result = self._call.remote(plans, *tensors)
        result.add_done_callback(lambda _: self._answered(plans))
        return result

    def _answered(self, plans: Sequence[StepPlan]) -> None:
        self._under_way -= 1
        self.done.extend(plans)


async def totals(group: Group) -> dict[str, float]:
    families: list[Any] = await group.coordinator.metric_families()
    return {sample.name: sample.value for family in families for sample in family.samples if len(sample.labels) == 2}


async def test_a_clients_image_waits_for_one_step_of_a_calibration(group: Group) -> None:
    log = PlanLog(group)
    recorded = group.start("calibration/0", steps=STEPS, calibration=RECORD)
    async with asyncio.timeout(60):
        while len(log.done) < 3:  # noqa: ASYNC110  it has no event for tests
            await asyncio.sleep(0)
        before = len(log.done)
        result = await group.start("client/0", steps=6)
        assert result.sums == {}
        measured = await recorded
    came = next(number for number, plan in enumerate(log.done) if not plan.background)
    assert came - before <= 1
    assert log.ahead == [0] * STEPS
    assert [plan.rows[0].step for plan in log.done if plan.background] == list(range(STEPS))
    assert measured.report.schedule == "C" * STEPS
    assert measured.sums["cond"].rows == 1
    assert not group.rank._engine.rows


async def test_a_calibration_is_no_image_in_the_metrics(group: Group) -> None:
    await group.start("calibration/0", steps=STEPS, calibration=RECORD)
    counts = group.coordinator.counts
    assert (counts.admitted, counts.finished, counts.computed_seconds) == (0, 0, 0.0)
    assert (counts.calibration_runs, counts.calibration_seconds > 0) == (1, True)
    assert (await totals(group))["flux_request_skip_ratio_count"] == 0
