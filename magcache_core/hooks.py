"""MagCache on a plain diffusers transformer: `apply_mag_cache` and `remove_mag_cache`.

One hook on the transformer decides each call (compute or reuse) and, through `BlockTaps`, takes the block stack's input
at its head and its output at its tail; or, where velocities are reused, answers without the transformer. It is
registered with diffusers' own hook registry, under the name of diffusers' leading hook, so ``cache_context``,
``disable_cache`` and ``reset_stateful_hooks`` work on it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.correct import VELOCITY_MODES, velocity_steps
from magcache_core.diffusers_bridge import StatefulHook, attach, detach, enter_default_context, new_states
from magcache_core.plan_data import COMPUTE, Plan
from magcache_core.residual_stats import StepStatistics
from magcache_core.reuse import EXTRAPOLATING, check_reuse, reuse_weights
from magcache_core.run_position import Position, locate
from magcache_core.state import MagCacheState, schedule
from magcache_core.strategies import MagCacheStrategy, get_strategy
from magcache_core.taps import BlockTaps
from magcache_core.velocity_run import VelocityRun

logger = logging.getLogger(__name__)

HEAD_HOOK = "mag_cache_leader_block_hook"


def apply_mag_cache(
    transformer: nn.Module, config: MagCacheConfig | Plan, reuse: str | None = None, sigmas: Any = None
) -> None:
    """Make a diffusers transformer follow MagCache; replaces an earlier application.

    Each ``cache_context`` (``cond``, ``uncond``) has its own state. A run with another step count than the config's
    follows the same settings at its own count; an aborted run has no effect on the next one. Calls with ControlNet
    residuals compute.

    Args:
        transformer: the model, e.g. ``pipe.transformer``. A class without a registered strategy works as long as
            its blocks map the image stream to the same shape.
        config: the threshold rule's settings, which take the strategy's curve where they have none; or a plan (then
            runs must have its number of steps).
        reuse: one of `REUSE_MODES`; by default the plan's, or ``residual``.
        sigmas: noise levels of a run, for the extrapolating modes outside of a diffusers pipeline; by default the
            scheduler's, or the ``timestep`` that the transformer gets. Where velocities are reused, those of the whole
            run are needed (a final 0 may follow), and its steps must be Euler's.

    Raises:
        ConfigError: ``reuse`` is unknown, or there is no curve.
        ValueError, LookupError: the transformer's blocks aren't found or not understood.
    """
    try:
        strategy = get_strategy(transformer)
    except LookupError:
        strategy = MagCacheStrategy()
    if isinstance(config, MagCacheConfig) and not config.mag_ratios and not config.calibrate:
        if strategy.mag_ratios is None:
            raise ConfigError("mag_ratios", None, "given: no curve is known for this transformer (calibrate=True)")
        config = replace(config, mag_ratios=strategy.mag_ratios)
    states = new_states(BranchRun)
    hook = MagCacheHook(states, BlockTaps(transformer, strategy), config, reuse, sigmas)
    attach(transformer, {HEAD_HOOK: hook})


def remove_mag_cache(transformer: nn.Module) -> None:
    """Take MagCache off a transformer and free what it stored; does nothing where it isn't applied."""
    detach(transformer, (HEAD_HOOK,))


class BranchRun:
    """One run of one ``cache_context``: the decision machine and the residuals at hand, newest first.

    Attributes:
        next_step: the step that the next call of this run would be.
        residuals: (sigma or None, residual (rows, image_tokens, dim)) of the last computed steps, newest first.
        ahead: the run where velocities are reused.
        statistics: what calibration measured so far in this run.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the run and free its residuals."""
        self.steps = 0  # of the run under way; 0 before its first call
        self.machine: MagCacheState | None = None
        self.next_step = 0
        self.last_timestep: float | None = None
        self.growth = 1.0
        self.deviated = False  # other residuals are at hand than the plan's weights are fitted to
        self.residuals: list[tuple[float | None, Any]] = []
        self.ahead: VelocityRun | None = None
        self.statistics = StepStatistics()


class MagCacheHook(StatefulHook):
    """Decides each forward call of the transformer."""

    def __init__(
        self, state_manager: Any, taps: BlockTaps, config: MagCacheConfig | Plan, reuse: str | None, sigmas: Any
    ) -> None:
        super().__init__(state_manager)
        self.taps = taps
        self.config = config
        self.sigmas = None if sigmas is None else [float(sigma) for sigma in sigmas]
        self._mode = check_reuse(reuse or (config.reuse if isinstance(config, Plan) else "residual"))
        self._fitted = config.weights if isinstance(config, Plan) and reuse in (None, config.reuse) else ()
        if isinstance(config, MagCacheConfig) and config.calibrate:
            self._mode = "residual"  # every step computes, and is measured
        self._history = max([2 if self._mode in EXTRAPOLATING else 1, *map(len, self._fitted)])
        self._signature: inspect.Signature | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the transformer's parameters, to find its timestep and ControlNet residuals in a call."""
        self._signature = inspect.signature(module.forward)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer's forward with the block stack computed or replaced."""
        enter_default_context(self.state_manager)
        run: BranchRun = self.state_manager.get_state()
        arguments = self._signature.bind(*args, **kwargs).arguments  # type: ignore[union-attr]
        position = locate(module, self.state_manager.context, arguments, run, self._steps)
        if run.steps == 0 or position.step != run.next_step or position.restart:
            self._begin(run, position)

        def forward() -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

        sigma = self._sigma(position)
        external = _has_controlnet(arguments)
        if self._mode in VELOCITY_MODES:
            output = self._corrected(run, position, forward, external)
            self._advance(run, position)
            return output
        if external:
            # They were added between blocks, so the stack's residual would hold them a second time.
            run.residuals.clear()
            run.deviated = True
        if self._computes(run, position, must_compute=not run.residuals):
            output = self.taps.run(forward)
            if not external and position.step < run.steps:
                self._store(run, sigma)
        else:
            output = self.taps.run(forward, self._replacement(run, position, sigma))
        self._advance(run, position)
        return output

    def _advance(self, run: BranchRun, position: Position) -> None:
        run.next_step = position.step + 1
        if run.next_step >= run.steps:
            self._end(run, position)

    def _corrected(self, run: BranchRun, position: Position, forward: Callable[[], Any], external: bool) -> Any:
        """A step of a run that reuses velocities. After a call that must compute as it is, the run begins anew."""
        if external or position.step >= run.steps:
            run.ahead = None
            return forward()
        if run.ahead is None:
            levels = position.levels if self.sigmas is None else (*self.sigmas, 0.0)[: run.steps + 1]
            if len(levels) != run.steps + 1:
                raise ConfigError("sigmas", None, f"given for reuse={self._mode!r}, one per step of the run")
            config = self.config
            marks = config.schedule if isinstance(config, Plan) else schedule(config.resampled(run.steps))
            marks = COMPUTE + marks[position.step + 1 :]
            first = position.step
            products = tuple(row[first:] for row in config.products[first:]) if isinstance(config, Plan) else ()
            run.ahead = VelocityRun(velocity_steps(marks, levels[first:], self._mode, products), first)
        return run.ahead.take(position.step, forward)

    @property
    def _steps(self) -> int:
        return len(self.config.schedule) if isinstance(self.config, Plan) else self.config.num_inference_steps

    def _begin(self, run: BranchRun, position: Position) -> None:
        run.reset()
        run.last_timestep = position.timestep
        run.steps = position.steps
        run.deviated = position.step > 0
        if isinstance(self.config, MagCacheConfig):
            run.machine = MagCacheState(self.config.resampled(position.steps))
            run.machine.next_step = position.step
        elif position.steps != self._steps:
            raise ConfigError("plan", f"{self._steps} steps", f"planned for the run's {position.steps} steps")

    def _computes(self, run: BranchRun, position: Position, must_compute: bool) -> bool:
        if position.step >= run.steps:
            return True
        if run.machine is not None:
            compute = run.machine.step(must_compute).compute
            ratios = run.machine.config.ratios
        else:
            assert isinstance(self.config, Plan)
            compute = must_compute or self.config.schedule[position.step] == COMPUTE
            ratios = self.config.ratios
            run.deviated = run.deviated or (compute and self.config.schedule[position.step] != COMPUTE)
        if compute:
            run.growth = 1.0
        elif ratios:
            run.growth *= ratios[position.step]
        return compute

    def _store(self, run: BranchRun, sigma: float | None) -> None:
        residual = self.taps.residual
        if isinstance(self.config, MagCacheConfig) and self.config.calibrate:
            run.statistics.add(residual, run.residuals[0][1] if run.residuals else None)
        run.residuals.insert(0, (sigma, residual))
        del run.residuals[self._history :]

    def _replacement(self, run: BranchRun, position: Position, sigma: float | None) -> Any:
        """The residual that stands in for the block stack's, (rows, image_tokens, dim), or a strategy's pair."""
        weights = self._fitted[position.step] if self._fitted and not run.deviated else self._formula(run, sigma)
        return run.residuals[0][1] if weights == (1.0,) else _sum([kept for _, kept in run.residuals], weights)

    def _formula(self, run: BranchRun, sigma: float | None) -> tuple[float, ...]:
        mode = "residual" if self._fitted else self._mode
        known = [at for at, _ in run.residuals]
        if mode in EXTRAPOLATING and (sigma is None or None in known):
            raise ConfigError("sigmas", None, f"given for reuse={mode!r}: this run's noise levels are not known")
        levels = [0.0 if at is None else at for at in known]
        return reuse_weights(mode, sigma or 0.0, levels, run.growth)

    def _sigma(self, position: Position) -> float | None:
        if self.sigmas is not None and position.step < len(self.sigmas):
            return self.sigmas[position.step]
        return position.sigma

    def _end(self, run: BranchRun, position: Position) -> None:
        if isinstance(self.config, MagCacheConfig) and self.config.calibrate and run.statistics.norm_ratios:
            run.statistics.log(logger)
        if position.timestep is None:
            run.reset()
        else:
            # Only a rising timestep will tell whether the next call begins a run or goes on with a longer one.
            run.residuals.clear()
            run.ahead = None
            run.statistics = StepStatistics()


def _sum(residuals: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted sum of as many residuals as there are weights; of pairs, part by part."""
    if isinstance(residuals[0], tuple):
        return tuple(_sum(parts, weights) for parts in zip(*residuals, strict=True))
    total = residuals[0] * weights[0]
    for weight, residual in zip(weights[1:], residuals[1:], strict=False):
        total = total.add(residual, alpha=weight)
    return total


def _has_controlnet(arguments: Mapping[str, Any]) -> bool:
    return any("controlnet" in name and name.endswith("samples") and v is not None for name, v in arguments.items())
