"""A schedule with how its reused steps are filled in: what the planner returns and what `decisions` follows."""

from __future__ import annotations

from dataclasses import dataclass

from magcache_core.config import ConfigError

COMPUTE = "C"
REUSE = "."


@dataclass(frozen=True)
class Plan:
    """A schedule chosen ahead.

    Attributes:
        schedule: one character per step, ``C`` computes, ``.`` reuses; the first step computes.
        reuse: the reuse mode asked for (see `REUSE_MODES`), or ``auto`` when it was chosen per segment.
        predicted_error: what the planner expects to add up, in the unit of the costs it planned with.
        segment_reuse: for ``auto``, the mode of each segment, one per computed step.
        ratios: the curve at the schedule's steps (for ``scaled`` reuse); empty when unknown.
        weights: by step, the weights of the last computed residuals, newest first (empty for computed steps), where
            they were fitted ahead; empty when the mode's formula gives them.
        unit: ``latent`` when the costs were measured in latent space, ``ratio`` when only magnitudes were known.
    """

    schedule: str
    reuse: str = "residual"
    predicted_error: float = 0.0
    segment_reuse: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    unit: str = "ratio"

    def __post_init__(self) -> None:
        if set(self.schedule) - {COMPUTE, REUSE} or not self.schedule.startswith(COMPUTE):
            raise ConfigError("schedule", self.schedule, "a string of 'C' and '.' that begins with 'C'")
        if self.segment_reuse and len(self.segment_reuse) != self.computed:
            raise ConfigError("segment_reuse", self.segment_reuse, f"one mode per computed step, {self.computed}")

    @property
    def computed(self) -> int:
        """Number of steps that run the block stack."""
        return self.schedule.count(COMPUTE)

    @property
    def skipped(self) -> int:
        """Number of steps that reuse."""
        return self.schedule.count(REUSE)

    @property
    def modes(self) -> tuple[str, ...]:
        """The reuse mode of each segment (a computed step and the reused ones after it)."""
        return self.segment_reuse or (self.reuse,) * self.computed
