"""Jobs, plans and a clock for tests of the scheduler, with the schedules of FLUX.1-dev."""

from __future__ import annotations

from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL

ON = MagCacheOptions(True)
FLUX_DEV = Settings(magcache=MagCacheSettings(profile="flux.1-dev"))
DEV_PLANNER = SchedulePlanner(FLUX_DEV, FlowMatchSampler(MODEL))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def rows_at_once(rows: int) -> Settings:
    return FLUX_DEV.model_copy(update={"max_batch_rows": rows})


def submit(scheduler: StepScheduler, *jobs: DenoiseJob):
    return [scheduler.submit(one, DEV_PLANNER.schedules(one)) for one in jobs]


def drain(scheduler: StepScheduler) -> list[StepPlan]:
    return list(iter(scheduler.next_plan, None))
