"""Measure uncached runs of a pipeline: residual statistics per step, and what reuse would have cost.

Recording changes nothing in a run. Afterwards each recorded call is replayed with a reused residual in the place of
the block stack, which needs only the cheap parts of the transformer, and compared with the velocity that was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from magcache_core.costs import COST_MODES, CostTable, empty_table
from magcache_core.diffusers_bridge import StatefulHook, attach, detach, new_states
from magcache_core.fit import least_squares
from magcache_core.hooks import apply_mag_cache, remove_mag_cache
from magcache_core.plan_data import COMPUTE, REUSE, Plan
from magcache_core.resample import interpolate
from magcache_core.residual_stats import StepStatistics
from magcache_core.reuse import reuse_weights
from magcache_core.strategies import get_strategy
from magcache_core.taps import BlockTaps
from magcache_core.velocity_run import sample_of

RECORD_HOOK = "mag_cache_record_hook"


@dataclass
class BranchTrace:
    """One uncached run of one CFG branch, one entry per step.

    Attributes:
        replays: by step, the velocity (rows, image_tokens, channels) with a given residual in the stack's place.
        residuals: (rows, image_tokens, dim).
        velocities: (rows, image_tokens, channels).
    """

    replays: list[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=list)
    residuals: list[torch.Tensor] = field(default_factory=list)
    velocities: list[torch.Tensor] = field(default_factory=list)

    def reset(self) -> None:
        """Diffusers' registry calls this when it resets stateful hooks."""


class _Recorder(StatefulHook):
    """Lets every call compute and records its residual, its velocity and how to replay it."""

    def __init__(self, state_manager: Any, taps: BlockTaps, traces: dict[str, BranchTrace]) -> None:
        super().__init__(state_manager)
        self._taps = taps
        self._traces = traces

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run and record one forward."""
        name = self.context_name()
        trace = self._traces.setdefault("cond" if name == "inference" else name, BranchTrace())
        original = self.fn_ref.original_forward

        def replay(residual: torch.Tensor) -> torch.Tensor:
            return sample_of(self._taps.run(lambda: original(*args, **kwargs), residual))

        output = self._taps.run(lambda: original(*args, **kwargs))
        trace.replays.append(replay)
        trace.residuals.append(self._taps.residual)
        trace.velocities.append(sample_of(output))
        return output


@contextmanager
def recording(transformer: nn.Module) -> Iterator[dict[str, BranchTrace]]:
    """Record every call of ``transformer`` in the block: traces by branch (the ``cache_context``'s name)."""
    traces: dict[str, BranchTrace] = {}
    taps = BlockTaps(transformer, get_strategy(transformer))
    attach(transformer, {RECORD_HOOK: _Recorder(new_states(BranchTrace), taps, traces)})
    try:
        yield traces
    finally:
        detach(transformer, (RECORD_HOOK,))


class BranchMeasurement:
    """Sums over runs of one CFG branch: statistics, inner products and squared costs, in fp32 or better."""

    def __init__(self, sigmas: Sequence[float], max_skip: int) -> None:
        """
        Args:
            sigmas: noise level of each step and the final one, falling, steps + 1 values.
            max_skip: longest segment to measure, in reused steps.
        """
        self._sigmas = list(sigmas)
        self.steps = len(self._sigmas) - 1
        self.max_skip = min(max_skip, self.steps - 1)
        self._rows = 0
        self._statistics = torch.zeros(3, self.steps, dtype=torch.float64)
        self._gram = torch.zeros(self.steps, self.steps, dtype=torch.float64)
        self._velocities = torch.zeros(self.steps, self.steps, dtype=torch.float64)
        self._pairwise = {mode: empty_table(self.steps, self.max_skip) for mode in COST_MODES}
        self._segments = {mode: empty_table(self.steps, self.max_skip) for mode in COST_MODES}

    @torch.no_grad()
    def add(self, trace: BranchTrace, progress: Callable[[], object] = lambda: None) -> None:
        """Add one recorded run of some rows; ``progress`` is called once per step."""
        rows = trace.residuals[0].shape[0]
        statistics = StepStatistics()
        for i, residual in enumerate(trace.residuals):
            statistics.add(residual, trace.residuals[i - 1] if i else None)
        self._statistics += rows * torch.tensor(
            [statistics.norm_ratios, statistics.norm_stds, statistics.cos_dises], dtype=torch.float64
        )
        for row in range(rows):
            flat = torch.stack([residual[row].float().flatten() for residual in trace.residuals])
            self._gram += (flat @ flat.T).double().cpu() / trace.residuals[0].shape[1]
            # Velocities are alike, and their differences are what counts, so single precision would not do.
            moving = torch.stack([velocity[row].double().flatten() for velocity in trace.velocities])
            self._velocities += (moving @ moving.T).cpu()
        for a in range(self.steps):
            for mode in COST_MODES:
                gaps = range(1, min(a, self.max_skip + 1) + 1) if mode != "residual" and a else range(1)
                for gap in gaps:
                    self._add_segment(trace, mode, a, gap)
            progress()
        self._rows += rows

    def _add_segment(self, trace: BranchTrace, mode: str, a: int, gap: int) -> None:
        """Costs of the segments that begin at computed step ``a``, each one step longer than the one before."""
        drift = torch.zeros_like(trace.velocities[a], dtype=torch.float32)
        levels = [self._sigmas[a]] + ([self._sigmas[a - gap]] if gap else [])
        for length in range(1, min(self.max_skip, self.steps - 1 - a) + 1):
            i = a + length
            if mode == "fitted":
                weights = least_squares(self._gram, i, [a, a - gap] if gap else [a])
            else:
                weights = reuse_weights(mode, self._sigmas[i], levels)
            residual = trace.residuals[a] * weights[0]
            if gap and len(weights) > 1:
                residual += trace.residuals[a - gap] * weights[1]
            error = trace.replays[i](residual).float() - trace.velocities[i].float()
            moved = error * (self._sigmas[i + 1] - self._sigmas[i])  # (rows, image_tokens, channels)
            drift += moved
            # Plain reuse costs the same whatever came before, so its one row fills all gaps.
            where = slice(0, self.max_skip + 2) if mode == "residual" else slice(gap, gap + 1)
            for table, vector in ((self._pairwise[mode], moved), (self._segments[mode], drift)):
                entry = table[a, where, length]
                table[a, where, length] = torch.where(torch.isinf(entry), 0.0, entry) + vector.square().sum().cpu()

    def statistics(self) -> tuple[list[float], list[float], list[float]]:
        """Mean norm ratios, stds and cosine distances over all rows, one value per step each."""
        ratios, stds, cosines = (self._statistics / self._rows).tolist()
        return ratios, stds, cosines

    def costs(self, sensitivity: Sequence[float]) -> CostTable:
        """Root mean square over all rows of each cost; ``sensitivity`` comes from `measure_sensitivity`."""

        def table(sums: torch.Tensor) -> torch.Tensor:
            return (sums / self._rows).sqrt()

        return CostTable(
            {mode: table(sums) for mode, sums in self._pairwise.items()},
            {mode: table(sums) for mode, sums in self._segments.items()},
            self._gram / self._rows,
            torch.tensor(sensitivity),
            self._velocities / self._rows,
        )


def measure_sensitivity(
    transformer: nn.Module,
    run: Callable[[], list[torch.Tensor]],
    steps: int,
    stride: int = 3,
    progress: Callable[[], object] = lambda: None,
) -> list[float]:
    """How much a displacement of the latents grows from each step to the end of the run.

    Runs again with a single reused step, at every ``stride``-th step, and compares how far that moved the latents there
    and at the end; steps between are interpolated over the logarithm.

    Args:
        transformer: the model that ``run`` calls.
        run: one run; the latents after each step, (rows, image_tokens, channels).
        steps: denoising steps.
        progress: called after each run.

    Returns:
        One factor per step; that of the last step is 1.
    """
    reference = run()
    probes = sorted({*range(1, steps, stride), steps - 1})
    logs = []
    for probe in probes:
        apply_mag_cache(transformer, Plan(COMPUTE * probe + REUSE + COMPUTE * (steps - 1 - probe)))
        moved = run()
        remove_mag_cache(transformer)
        here, end = ((moved[i] - reference[i]).float().norm().item() for i in (probe, steps - 1))
        # Where reuse moved nothing there is no growth to measure; 1 is assumed.
        logs.append(math.log(end / here) if here > 0 and end > 0 else 0.0)
        progress()
    levels = [-float(probe) for probe in probes]
    return [math.exp(interpolate(levels, logs, -float(step))) for step in range(steps)]
