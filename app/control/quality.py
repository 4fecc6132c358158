"""Lowers the computed steps of an image to meet its deadline, or under load. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from app.control.schedule import BranchSchedule, SchedulePlanner
from app.messages.jobs import DenoiseJob, steps_of_share
from app.settings import MagCacheSettings

Reason = Literal["deadline", "load"]
MARGIN = 0.9
"""Share of the available time that a lowered schedule may take by its estimate, which can be too low."""


@dataclass(frozen=True)
class Choice:
    """The schedules chosen for an image.

    Attributes:
        meets_deadline: whether the image is estimated to be done in time.
    """

    schedules: Mapping[str, BranchSchedule]
    lowered_by: Reason | None
    meets_deadline: bool


def computed_steps(schedules: Mapping[str, BranchSchedule]) -> int:
    """Steps that compute, in the branch that computes most."""
    return max(schedule.text.count("C") for schedule in schedules.values())


class ScheduleSelector:
    """Chooses the most computed steps that load and deadline allow."""

    def __init__(self, server: MagCacheSettings, planner: SchedulePlanner) -> None:
        self._server = server
        self._planner = planner

    def choose(
        self,
        job: DenoiseJob,
        pressure: float,
        time_s: float | None,
        seconds: Callable[[Mapping[str, BranchSchedule]], float],
    ) -> Choice:
        """The schedules that ``job`` follows.

        Args:
            pressure: how far load lowers towards the floor, 0 to 1.
            time_s: seconds until the deadline; None without one.
            seconds: how long it will take with given schedules; fewer computed steps take no longer.
        """
        chosen: Mapping[str, BranchSchedule] = self._planner.schedules(job)
        most = computed_steps(chosen)
        floor = min(self._floor(job), most)
        by_load = most - round(pressure * (most - floor))
        reason: Reason | None = None
        if by_load < most:
            chosen, reason = self._with(job, by_load), "load"
        if time_s is None or seconds(chosen) <= time_s:
            return Choice(chosen, reason, True)
        low, high = floor, by_load  # `high` is too slow
        lowest = self._with(job, low) if low < high else chosen
        if low == high or seconds(lowest) > time_s * MARGIN:
            return Choice(lowest, "deadline" if low < high else reason, seconds(lowest) <= time_s)
        while high - low > 1:
            middle = (low + high) // 2
            if seconds(self._with(job, middle)) <= time_s * MARGIN:
                low = middle
            else:
                high = middle
        return Choice(self._with(job, low), "deadline", True)

    def _floor(self, job: DenoiseJob) -> int:
        """The fewest computed steps that ``job`` may be lowered to; all of its steps where it may not be."""
        options = job.magcache
        if options.min_computed_steps is None and (options.client_chose or not options.enabled):
            return job.steps_to_run
        fewest = self._planner.fewest(job, options)
        if fewest is None:
            return job.steps_to_run
        share = steps_of_share(self._server.min_computed_share, job.steps_to_run)
        return max(fewest, share, options.min_computed_steps or 1)

    def _with(self, job: DenoiseJob, computed: int) -> dict[str, BranchSchedule]:
        options = replace(
            job.magcache,
            enabled=True,
            mag_threshold=None,
            computed_steps=computed,
            computed_share=None,
            floor_db=None,
        )
        return self._planner.schedules(job, options)
