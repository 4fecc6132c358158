"""One image in the request table, from its submission to its last step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from app.control.schedule import BranchSchedule, RowSchedule, make_row_schedule
from app.engine.geometry import Geometry
from app.messages import COND, UNCOND, DenoiseJob, DenoiseReport, RowStep
from app.settings import Settings

DueKey = tuple[float, int]
"""When an image is due, in the clock's seconds, and the number of its arrival: unique, and least goes first."""


@dataclass(frozen=True)
class RowShape:
    """What decides the time of a row's step: rows of equal shapes share a forward pass.

    Attributes:
        tokens: image, text and reference tokens of one CFG branch.
    """

    geometry: Geometry
    tokens: int

    @classmethod
    def of(cls, job: DenoiseJob, settings: Settings) -> "RowShape":
        """The shape of ``job``'s rows."""
        tokens = settings.image_tokens(job.width * job.height) + job.source_tokens
        return cls(Geometry.of(job.width, job.height), tokens)


@dataclass(eq=False)
class RequestState:
    """One image.

    Attributes:
        key: its place in the order, least first: when it is due, in the clock's seconds, and the number of its arrival.
        admitted_s: when it joined the batch; None while it waits.
        step: steps planned so far.
        deferred: it computes, and had to leave the last batch to others.
        eta_s, position: the estimates at its arrival: seconds to its last step, and its place in the queue.
        lowered_by: what took computed steps from it, ``deadline`` or ``load``.
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
    previews: frozenset[int] = field(init=False)
    row_schedule: RowSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.previews = preview_steps(self.job.steps_to_run, self.job.partial_images)
        self.set_schedule(self.schedules, None)

    def set_schedule(self, schedules: Mapping[str, BranchSchedule], lowered_by: str | None) -> None:
        """Take these schedules; only before the first step."""
        self.schedules = schedules
        self.row_schedule = make_row_schedule(schedules)
        self.lowered_by = lowered_by

    @property
    def tokens(self) -> int:
        """What a step costs of the budget when every CFG branch computes."""
        return self.shape.tokens * len(self.schedules)

    @property
    def cost(self) -> int:
        """What the next step costs of the budget: the tokens of the branches that compute."""
        return self.shape.tokens * self.row_schedule.computing[self.step]

    @property
    def coming_cost(self) -> int:
        """What its next step that computes costs of the budget; 0 when none does any more."""
        step = self.row_schedule.step_after(self.step, 0)
        return self.shape.tokens * self.row_schedule.computing[step] if step < len(self.row_schedule.steps) else 0

    @property
    def rounds(self) -> int:
        """Steps that compute, in whatever branch, and are not planned yet."""
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
        return RowStep(self.job.row_id, step, self.row_schedule.steps[step], last, step in self.previews)

    def report(self, finished_s: float) -> DenoiseReport:
        """How the image was denoised; it was admitted."""
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
        )


@lru_cache(maxsize=1024)
def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps whose x0 estimate is shown: evenly spread, fewer where steps are few, and never the last one."""
    return frozenset(i * steps // (previews + 1) for i in range(1, previews + 1)) - {steps - 1}
