"""Calibrations that the service begins by itself, with a stand-in for what runs them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from app.cluster.idle import calibrate_when_idle
from app.control.demand import OFTEN, CalibrationDemand, Measurable
from app.engine.families import FLUX_DEV, Family
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.settings import MagCacheSettings, Settings
from magcache_core import load_profile, save_profile


class StandIn:
    """Ends at once: a calibration of the steps in ``failing`` fails, another one writes a profile."""

    def __init__(self, folder: Path, failing: tuple[int, ...] = ()) -> None:
        self.busy = False
        self.left: CalibrationJob | None = None
        self.jobs: list[CalibrationJob] = []
        self._folder = folder
        self._failing = failing

    def start(self, job: CalibrationJob) -> CalibrationStatus:
        self.jobs.append(job)
        if job.steps not in self._failing:
            scale = None if job.negative_prompt is None else job.true_cfg_scale
            profile = replace(load_profile("flux-tiny"), name=job.id, model="models/uncalibrated")
            save_profile(replace(profile, guidance_scale=job.guidance_scale, true_cfg_scale=scale), self._folder)
        return self.status(job.id)

    def status(self, calibration_id: str) -> CalibrationStatus:
        state = "failed" if self.jobs[-1].steps in self._failing else "done"
        return CalibrationStatus(calibration_id, state, "try", 1, 1, 1.0)

    def interrupted(self) -> CalibrationJob | None:
        left, self.left = self.left, None
        return left

    async def join(self) -> None:
        pass


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(model="models/uncalibrated", magcache=MagCacheSettings(profile_dir=str(tmp_path), calibrate="idle"))


async def family() -> Family:
    return FLUX_DEV


async def watch(settings: Settings, stand_in: StandIn, demand: CalibrationDemand, calibrations: int) -> None:
    """Let it look around until there were so many calibrations, and some times more."""
    task = asyncio.create_task(calibrate_when_idle(settings, stand_in, demand, family, look_s=0.001))
    async with asyncio.timeout(60):
        while len(stand_in.jobs) < calibrations:  # noqa: ASYNC110  it has no event for tests
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.wait({task})


async def test_the_default_image_and_then_what_is_asked_for_often(settings: Settings, tmp_path: Path) -> None:
    stand_in, demand = StandIn(tmp_path), CalibrationDemand(settings)
    demand.note(Measurable(28, 128, 128, 7.0), OFTEN)
    await watch(settings, stand_in, demand, 2)
    assert [(job.steps, job.width, job.guidance_scale) for job in stand_in.jobs] == [(28, 128, 3.5), (28, 128, 7.0)]


async def test_true_cfg_is_calibrated_against_the_empty_prompt(settings: Settings, tmp_path: Path) -> None:
    stand_in, demand = StandIn(tmp_path), CalibrationDemand(settings)
    demand.note(Measurable(28, 128, 128, 3.5, 4.0), OFTEN)
    await watch(settings, stand_in, demand, 2)
    asked = [(job.negative_prompt, job.true_cfg_scale) for job in stand_in.jobs]
    assert asked == [(None, 1.0), ("", 4.0)]


async def test_what_was_interrupted_goes_on_first_and_without_idle_too(settings: Settings, tmp_path: Path) -> None:
    left = CalibrationJob("calibration-left", ("a",), 12, 64, 64, 1.0, 4, (4,))
    stand_in = StandIn(tmp_path, failing=(12,))
    stand_in.left = left
    await watch(settings, stand_in, CalibrationDemand(settings), 2)
    assert stand_in.jobs[0] == left
    assert [job.steps for job in stand_in.jobs] == [12, 28]
    asking = settings.model_copy(update={"magcache": settings.magcache.model_copy(update={"calibrate": "ask"})})
    alone = StandIn(tmp_path)
    alone.left = left
    await watch(asking, alone, CalibrationDemand(asking), 1)
    assert alone.jobs == [left]


async def test_one_that_failed_is_not_begun_again(settings: Settings, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, failing=(28,))
    await watch(settings, stand_in, CalibrationDemand(settings), 1)
    assert len(stand_in.jobs) == 1


async def test_it_waits_for_one_under_way(settings: Settings, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path)
    stand_in.busy = True
    await watch(settings, stand_in, CalibrationDemand(settings), 0)
    assert stand_in.jobs == []
