"""The state of one image in the request table, from its submission to its last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from app.control.quality import ScheduleSelector
from app.control.schedule import BranchSchedule, RowSchedule, make_row_schedule
from app.engine.geometry import Geometry
from app.messages.jobs import COND, UNCOND, DenoiseJob
from app.messages.plans import RowStep
from app.messages.results import DenoiseReport
from app.settings import Settings

DueKey = tuple[float, int]
"""Due time in the clock's seconds, and number of arrival: unique, and the least goes first."""


@dataclass(frozen=True)
class RowShape:
    """Decides the time of a row's step: rows of equal shapes share a forward pass.

    Attributes:
        tokens: image, text and reference tokens of one CFG branch.
    """

    geometry: Geometry
    tokens: int

    @classmethod
    def of(cls, job: DenoiseJob, settings: Settings) -> RowShape:
        """The shape of ``job``'s rows."""
        tokens = settings.image_tokens(job.width * job.height) + job.source_tokens
        return cls(Geometry.of(job.width, job.height), tokens)


@dataclass(eq=False)
class RequestState:
    """One image: its job, its schedules and how far it is.

    Attributes:
        key: its place in the order, least first.
        urgency_s: due time by patience, deadline and priority.
        admitted_s: when it joined the batch; None while it waits.
        step: steps planned so far.
        deferred: its computed step did not fit into the last batch; it goes first in the next.
        eta_s, position: the estimates at its arrival: seconds to its last step, and its place in the queue.
        lowered_by: why it computes fewer steps than asked for, ``deadline`` or ``load``.
        selector: what chose its schedules at its arrival and does so again at its admission, by the same profiles; a
            calibration's row has none.
    """

    job: DenoiseJob
    shape: RowShape
    schedules: Mapping[str, BranchSchedule]
    submitted_s: float
    key: DueKey
    admitted_s: float | None = None
    step: int = 0
    deferred: bool = False
    eta_s: float = 0.0
    position: int = 0
    lowered_by: str | None = None
    urgency_s: float = 0.0
    selector: ScheduleSelector | None = None
    previews: frozenset[int] = field(init=False)
    row_schedule: RowSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.previews = preview_steps(self.job.steps_to_run, self.job.partial_images)
        self.set_schedule(self.schedules, None)

    def set_schedule(self, schedules: Mapping[str, BranchSchedule], lowered_by: str | None) -> None:
        """Replace the schedules; only before the first step."""
        self.schedules = schedules
        self.row_schedule = make_row_schedule(schedules)
        self.lowered_by = lowered_by

    @property
    def tokens(self) -> int:
        """Tokens of a step in which every CFG branch computes."""
        return self.shape.tokens * len(self.schedules)

    @property
    def cost(self) -> int:
        """Tokens that the next step takes of the budget: those of the branches that compute."""
        return self.shape.tokens * self.row_schedule.computing[self.step]

    @property
    def work(self) -> int:
        """Tokens of all its computed steps."""
        return self.shape.tokens * self.row_schedule.computed[-1]

    @property
    def coming_cost(self) -> int:
        """Tokens of its next computed step; 0 if none is left."""
        step = self.row_schedule.step_after(self.step, 0)
        return self.shape.tokens * self.row_schedule.computing[step] if step < len(self.row_schedule.steps) else 0

    @property
    def rounds(self) -> int:
        """Computed steps (in any branch) that are not planned yet."""
        return self.row_schedule.rounds[-1] - self.row_schedule.rounds[self.step]

    @property
    def remaining(self) -> int:
        """Steps that are not planned yet."""
        return len(self.row_schedule.steps) - self.step

    @property
    def deadline_s(self) -> float | None:
        """The deadline in the clock's seconds."""
        return None if self.job.deadline_s is None else self.submitted_s + self.job.deadline_s

    @property
    def deadline_key(self) -> DueKey | None:
        """Its place among the deadlines; None without one."""
        return None if self.deadline_s is None else (self.deadline_s, self.key[1])

    def next_step(self) -> RowStep:
        """The row's part of the next plan."""
        step = self.step
        last = self.remaining == 1
        move, estimate = self.row_schedule.velocities[step]
        branches = self.row_schedule.steps[step]
        return RowStep(self.job.row_id, step, branches, last, step in self.previews, move, estimate)

    def report(self, finished_s: float) -> DenoiseReport:
        """How the image was denoised; only after its admission."""
        assert self.admitted_s is not None
        cond, uncond = self.schedules[COND], self.schedules.get(UNCOND)
        return DenoiseReport(
            schedule=cond.text,
            computed=cond.text.count("C"),
            skipped=cond.text.count("."),
            predicted_error=cond.predicted_error,
            negative_schedule=uncond.text if uncond else None,
            queue_seconds=self.admitted_s - self.submitted_s,
            denoise_seconds=finished_s - self.admitted_s,
            eta_seconds=self.eta_s,
            queue_position=self.position,
            lowered_by=self.lowered_by,
            uncached_reason=cond.uncached_reason,
            profile=cond.profile,
            predicted_psnr_db=cond.predicted_psnr_db,
            floor_db=cond.floor_db,
            plan_reason=cond.plan_reason,
        )


@lru_cache(maxsize=1024)
def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps whose x0 estimate is shown: evenly spread, fewer where steps are few, and never the last one."""
    return frozenset(i * steps // (previews + 1) for i in range(1, previews + 1)) - {steps - 1}
