"""Plans (a schedule and how its reused steps are filled in) and trials (schedules that were run)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from magcache_core.config import ConfigError

COMPUTE = "C"
REUSE = "."

Weights = tuple[float, ...]
"""Factors of the last computed residuals or velocities, newest first."""
Products = tuple[tuple[float, ...], ...]
"""Inner products of the velocities of two steps, steps x steps; empty where they are not known."""


def computed_steps(schedule: str) -> list[int]:
    """The steps of a schedule that compute, rising."""
    return [step for step, mark in enumerate(schedule) if mark == COMPUTE]


def schedule_of(computed: Iterable[int], steps: int) -> str:
    """The schedule of ``steps`` steps of which those compute."""
    kept = set(computed)
    return "".join(COMPUTE if step in kept else REUSE for step in range(steps))


@dataclass(frozen=True)
class VelocityStep:
    """What one step of a predicted and corrected run does with the velocities at hand, its own among them.

    Attributes:
        velocity: the weighted sum that stands for the step's velocity in an Euler step; at a computed step it holds the
            correction of the steps before.
        move: the same for a whole segment at once: what a computed step adds to the latents so that they are where the
            next computed step takes them up; empty at reused steps, which add nothing then.
        estimate: what is added to the latents after ``move`` for an estimate of the finished image at this step.
    """

    velocity: Weights
    move: Weights
    estimate: Weights


@dataclass(frozen=True)
class Trial:
    """A schedule that was run.

    Attributes:
        schedule: one character per step, ``C`` computes, ``.`` reuses.
        reuse: how reused steps were filled in, one of `REUSE_MODES`.
        error: how far its images were from the uncached ones: root mean square over the pixels of an image, in
            [0, 1], geometric mean over the images. ``-20 log10(error)`` is the mean PSNR in dB.
    """

    schedule: str
    reuse: str
    error: float

    @property
    def computed(self) -> int:
        """Number of steps that ran the block stack."""
        return self.schedule.count(COMPUTE)


@dataclass(frozen=True)
class Plan:
    """A schedule chosen ahead.

    Attributes:
        schedule: one character per step, ``C`` computes, ``.`` reuses; the first step computes.
        reuse: how reused steps are filled in, one of `REUSE_MODES`.
        predicted_error: what the planner expects to add up, in the unit of the costs it planned with.
        ratios: the curve at the schedule's steps (for ``scaled`` reuse); empty when unknown.
        weights: by step, the weights of the last computed residuals, newest first (empty for computed steps), where
            they were fitted ahead; empty when the mode's formula gives them.
        products: of velocities, that ``least_squares`` weighs them by.
        reason: why the plan is another one than the profile recommends, though nothing was asked for; or empty.
        unit: ``latent`` when the costs were measured in latent space, ``ratio`` when only magnitudes were known.
    """

    schedule: str
    reuse: str = "residual"
    predicted_error: float = 0.0
    ratios: tuple[float, ...] = ()
    weights: tuple[Weights, ...] = ()
    unit: str = "ratio"
    reason: str = ""
    products: Products = ()

    def __post_init__(self) -> None:
        if set(self.schedule) - {COMPUTE, REUSE} or not self.schedule.startswith(COMPUTE):
            raise ConfigError("schedule", self.schedule, "a string of 'C' and '.' that begins with 'C'")
        if self.weights and len(self.weights) != len(self.schedule):
            raise ConfigError("weights", f"{len(self.weights)} entries", f"one per step, {len(self.schedule)}")
        if self.products and len(self.products) != len(self.schedule):
            raise ConfigError("products", f"{len(self.products)} rows", f"one per step, {len(self.schedule)}")

    @property
    def computed(self) -> int:
        """Number of steps that run the block stack."""
        return self.schedule.count(COMPUTE)

    @property
    def skipped(self) -> int:
        """Number of steps that reuse."""
        return self.schedule.count(REUSE)
