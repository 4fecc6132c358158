"""What calibration sums up over uncached runs, step by step as a run makes them.

A recorded pipeline (`magcache_core.measure`) and a service's own rows feed the same sums. Each computed step is
compared with what reuse would have made of it: a reused residual takes the place of the block stack's, which needs only
the cheap parts of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from magcache_core.costs import COST_MODES, CostTable, empty_table
from magcache_core.fit import least_squares
from magcache_core.profile_data import BranchCurve
from magcache_core.residual_stats import StepStatistics
from magcache_core.reuse import reuse_weights

LONGEST_SEGMENT = 12
"""Reused steps in a row to measure costs for; beyond it a schedule isn't planned."""


@dataclass(frozen=True, eq=False)
class BranchSums:
    """Sums over runs of one CFG branch, on the CPU; those of different runs add up.

    Attributes:
        rows: images that were measured.
        statistics: (3, steps), float64: norm ratios, their deviations, cosine distances.
        gram: (steps, steps), float64, inner products per token of the residuals of two steps.
        velocities: (steps, steps), float64, inner products per image of the velocities of two steps, those that move
            the latents.
        moved: (steps,), float64, by step, how far reuse of the step before's residuals, and nothing else, would have
            moved the latents there; squared.
        pairwise, segments: by mode, squared costs, float32; see `CostTable`.
    """

    rows: int
    statistics: torch.Tensor
    gram: torch.Tensor
    velocities: torch.Tensor
    moved: torch.Tensor
    pairwise: Mapping[str, torch.Tensor]
    segments: Mapping[str, torch.Tensor]

    def __add__(self, other: BranchSums) -> BranchSums:
        return BranchSums(
            self.rows + other.rows,
            self.statistics + other.statistics,
            self.gram + other.gram,
            self.velocities + other.velocities,
            self.moved + other.moved,
            {mode: table + other.pairwise[mode] for mode, table in self.pairwise.items()},
            {mode: table + other.segments[mode] for mode, table in self.segments.items()},
        )

    def costs(self, sensitivity: Sequence[float]) -> CostTable:
        """Root mean square over all rows of each cost; ``sensitivity`` as `magcache_core.measure.growth` gives it."""

        def table(sums: torch.Tensor) -> torch.Tensor:
            return (sums / self.rows).sqrt()

        return CostTable(
            {mode: table(sums) for mode, sums in self.pairwise.items()},
            {mode: table(sums) for mode, sums in self.segments.items()},
            self.gram / self.rows,
            torch.tensor(sensitivity),
            self.velocities / self.rows,
        )

    def curve(self, sensitivity: Sequence[float]) -> BranchCurve:
        """Means over all rows, as a profile keeps them."""
        means = (self.statistics / self.rows).tolist()
        ratios, stds, cosines = (tuple(round(value, 5) for value in values) for values in means)
        return BranchCurve(ratios, stds, cosines, self.costs(sensitivity))


class RunMeasurement:
    """One uncached run of one CFG branch, measured while it runs; `sums` are whole after its last step.

    It keeps the residuals and velocities of all steps as they are given, and for each segment under way the drift of
    the latents in float32: up to ``max_skip`` (2 max_skip + 3) tensors of a velocity's shape.
    """

    def __init__(self, sigmas: Sequence[float], max_skip: int = LONGEST_SEGMENT, gram: torch.Tensor | None = None):
        """
        Args:
            sigmas: noise level of each step and the final one, falling, steps + 1 values.
            max_skip: longest segment to measure, in reused steps.
            gram: of the runs before; the weights of ``fitted`` are those of all runs so far.
        """
        self._sigmas = list(sigmas)
        steps = len(self._sigmas) - 1
        self.max_skip = min(max_skip, steps - 1)
        self._gram_before = torch.zeros(steps, steps, dtype=torch.float64) if gram is None else gram
        self._statistics = StepStatistics()
        self._residuals: list[torch.Tensor] = []
        self._velocities: list[torch.Tensor] = []
        self._drifts: dict[tuple[str, int, int], torch.Tensor] = {}  # by mode, computed step and gap
        self._sums = BranchSums(
            0,
            torch.zeros(3, steps, dtype=torch.float64),
            torch.zeros(steps, steps, dtype=torch.float64),
            torch.zeros(steps, steps, dtype=torch.float64),
            torch.zeros(steps, dtype=torch.float64),
            {mode: empty_table(steps, self.max_skip) for mode in COST_MODES},
            {mode: empty_table(steps, self.max_skip) for mode in COST_MODES},
        )

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that it keeps."""
        return sum(one.nbytes for one in (*self._residuals, *self._velocities, *self._drifts.values()))

    @property
    def sums(self) -> BranchSums:
        """The sums of this run; ValueError before its last step."""
        steps = len(self._sigmas) - 1
        if len(self._residuals) != steps:
            raise ValueError(f"the run was measured at {len(self._residuals)} of its {steps} steps")
        rows = self._residuals[0].shape[0]
        found = self._statistics
        statistics = rows * torch.tensor([found.norm_ratios, found.norm_stds, found.cos_dises], dtype=torch.float64)
        sums = self._sums
        return replace(sums, rows=rows, statistics=statistics)

    @property
    def displacement(self) -> torch.Tensor | None:
        """How reuse of the residual before moves the latents at the newest step, (rows, image_tokens, channels).

        None at the first step, which has none before it.
        """
        return self._drifts.get(("residual", len(self._residuals) - 2, 0))

    @torch.no_grad()
    def add(
        self,
        residual: torch.Tensor,
        velocity: torch.Tensor,
        replay: Callable[[torch.Tensor], torch.Tensor],
        moving: torch.Tensor | None = None,
    ) -> None:
        """Measure the next step.

        Args:
            residual: (rows, image_tokens, dim), what the block stack added.
            velocity: (rows, image_tokens, channels), what the step computed.
            replay: the velocity of this step with a given residual in the stack's place.
            moving: the velocity that moves the latents, where it is not ``velocity`` alone.
        """
        step = len(self._residuals)
        self._statistics.add(residual, self._residuals[-1] if step else None)
        self._residuals.append(residual)
        self._velocities.append(velocity if moving is None else moving)
        _fill(self._sums.gram, step, self._residuals, torch.float32, scale=1 / residual.shape[1])
        # Velocities are alike, and their differences are what counts, so single precision would not do.
        _fill(self._sums.velocities, step, self._velocities, torch.float64)
        first = max(step - self.max_skip, 0)
        self._drifts = {key: drift for key, drift in self._drifts.items() if key[1] >= first}
        for mode in COST_MODES:
            for a in range(first, step):
                gaps = range(1, min(a, self.max_skip + 1) + 1) if mode != "residual" and a else range(1)
                for gap in gaps:
                    self._add_segment(mode, a, gap, velocity, replay)
        if self.displacement is not None:
            self._sums.moved[step] = self.displacement.square().sum().item()

    def _add_segment(
        self,
        mode: str,
        a: int,
        gap: int,
        velocity: torch.Tensor,
        replay: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """What the newest step costs as the last of a segment that begins at computed step ``a``."""
        step = len(self._residuals) - 1
        weights = self._weights(mode, step, a, gap)
        residual = self._residuals[a] * weights[0]
        if gap and len(weights) > 1:
            residual += self._residuals[a - gap] * weights[1]
        error = replay(residual).float() - velocity.float()
        moved = error * (self._sigmas[step + 1] - self._sigmas[step])  # (rows, image_tokens, channels)
        before = self._drifts.get((mode, a, gap))
        drift = self._drifts[mode, a, gap] = moved if before is None else before + moved
        # Plain reuse costs the same whatever came before, so its one row fills all gaps.
        where = slice(None) if mode == "residual" else gap
        self._sums.pairwise[mode][a, where, step - a] = moved.square().sum().item()
        self._sums.segments[mode][a, where, step - a] = drift.square().sum().item()

    def _weights(self, mode: str, step: int, a: int, gap: int) -> tuple[float, ...]:
        if mode == "fitted":
            return least_squares(self._gram_before + self._sums.gram, step, [a, a - gap] if gap else [a])
        levels = [self._sigmas[a]] + ([self._sigmas[a - gap]] if gap else [])
        return reuse_weights(mode, self._sigmas[step], levels)


def _fill(gram: torch.Tensor, step: int, known: Sequence[torch.Tensor], dtype: torch.dtype, scale: float = 1.0) -> None:
    """Set the inner products of the newest of ``known`` with all of them, summed in ``dtype``."""
    newest = known[step].to(dtype)
    inner = torch.stack([(one.to(dtype) * newest).sum() for one in known]).double().cpu() * scale
    gram[step, : step + 1] = inner
    gram[: step + 1, step] = inner
