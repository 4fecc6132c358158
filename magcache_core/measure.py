"""Record uncached runs of a pipeline for `magcache_core.run_sums`, and measure how displacements of the latents grow.

Recording changes nothing in a run. Each recorded call can be replayed with another residual in the place of the block
stack's, which needs only the cheap parts of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from magcache_core.diffusers_bridge import StatefulHook, attach, detach, new_states
from magcache_core.hooks import apply_mag_cache, remove_mag_cache
from magcache_core.plan_data import COMPUTE, REUSE, Plan
from magcache_core.resample import interpolate
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


def measure_sensitivity(
    transformer: nn.Module,
    run: Callable[[], list[torch.Tensor]],
    steps: int,
    progress: Callable[[], object] = lambda: None,
) -> list[float]:
    """How much a displacement of the latents grows from each step to the end of the run, by runs with a reused step.

    Args:
        transformer: the model that ``run`` calls.
        run: one run; the latents after each step, (rows, image_tokens, channels).
        steps: denoising steps.
        progress: called after each run.

    Returns:
        One factor per step; that of the last step is 1.
    """
    reference = run()
    distances = {}
    for probe in probes(steps):
        apply_mag_cache(transformer, Plan(probe_schedule(steps, probe)))
        moved = run()
        remove_mag_cache(transformer)
        here, end = ((moved[i] - reference[i]).float().norm().item() for i in (probe, steps - 1))
        distances[probe] = here, end
        progress()
    return growth(distances, steps)


def probes(steps: int, stride: int = 3) -> tuple[int, ...]:
    """The steps at which a displacement is followed: every ``stride``-th and the last one."""
    return tuple(sorted({*range(1, steps, stride), steps - 1}))


def probe_schedule(steps: int, probe: int) -> str:
    """The schedule that reuses at ``probe`` only."""
    return COMPUTE * probe + REUSE + COMPUTE * (steps - 1 - probe)


def growth(distances: Mapping[int, tuple[float, float]], steps: int) -> list[float]:
    """How much a displacement grows from each of ``steps`` steps to the end, by interpolation over the logarithm.

    Args:
        distances: by probed step, how far reuse there moved the latents after that step and after the last one.
    """
    # Where reuse moved nothing there is no growth to measure; 1 is assumed.
    found = {probe: math.log(end / here) if here > 0 and end > 0 else 0.0 for probe, (here, end) in distances.items()}
    levels = [-float(probe) for probe in found]
    return [math.exp(interpolate(levels, list(found.values()), -float(step))) for step in range(steps)]
