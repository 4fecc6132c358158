"""What a reused step adds, by reuse mode: weights of the last computed residuals or of the last velocities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.correct import VELOCITY_MODES, velocity_steps
from magcache_core.plan_data import COMPUTE, REUSE, Plan
from magcache_core.state import Decision, MagCacheState

REUSE_MODES = ("residual", "scaled", "linear", "fitted", *VELOCITY_MODES)
"""``residual``: the last computed residual as it is. ``scaled``: times the product of ratios since. ``linear``: first
order in sigma through the last two computed residuals. ``fitted``: the mix of the last three that was closest in
calibration, which a `Plan` carries; where nothing was fitted (a bare config) it is ``linear``. ``corrected``,
``integrated`` and ``least_squares`` reuse velocities: see `magcache_core.correct`."""

EXTRAPOLATING = ("linear", "fitted", *VELOCITY_MODES)
"""Modes whose formula needs noise levels."""


def check_reuse(reuse: str) -> str:
    """Return ``reuse`` if it is one of `REUSE_MODES`; `ConfigError` otherwise."""
    if reuse not in REUSE_MODES:
        raise ConfigError("reuse", reuse, f"one of {', '.join(REUSE_MODES)}")
    return reuse


def reuse_weights(mode: str, at: float, computed: Sequence[float], growth: float = 1.0) -> tuple[float, ...]:
    """Factors of the computed residuals, newest first, that stand in for the residual at noise level ``at``.

    Args:
        mode: one of `REUSE_MODES` that reuses residuals; the formula of ``fitted`` is that of ``linear``.
        at: sigma of the reused step.
        computed: sigmas of the steps whose residuals are at hand, newest first.
        growth: product of the ratios since the newest of them (for ``scaled``).

    Returns:
        One factor, or two when extrapolating and two residuals exist.
    """
    if mode in VELOCITY_MODES:
        raise ConfigError("reuse", mode, "a mode that reuses residuals")
    if mode == "scaled":
        return (growth,)
    if check_reuse(mode) not in EXTRAPOLATING or len(computed) < 2:
        return (1.0,)
    newest, before = computed[0], computed[1]
    t = (at - newest) / (newest - before)
    return (1.0 + t, -t)


def decisions(
    source: MagCacheConfig | Plan, sigmas: Sequence[float] | None = None, reuse: str | None = None
) -> tuple[Decision, ...]:
    """The whole trajectory ahead: one `Decision` per step.

    Args:
        source: the threshold rule's settings, or a plan.
        sigmas: the noise level of each step, falling (at least one per step; the final one may follow, and is 0 where
            it doesn't). The extrapolating modes need them.
        reuse: one of `REUSE_MODES`; by default what the plan says, or ``residual``.

    Raises:
        ConfigError: ``reuse`` is unknown, or sigmas are missing or too few.
    """
    if isinstance(source, Plan):
        mode = check_reuse(reuse or source.reuse)
        if source.weights and mode == source.reuse:
            return tuple(Decision(i, not weights, weights) for i, weights in enumerate(source.weights))
        steps = [Decision(i, compute=mark == COMPUTE) for i, mark in enumerate(source.schedule)]
    else:
        mode = check_reuse(reuse or "residual")
        state = MagCacheState(source)
        steps = [state.step() for _ in range(source.num_inference_steps)]
    levels = _levels(sigmas, len(steps), mode)
    if mode in VELOCITY_MODES:
        schedule = "".join(COMPUTE if decision.compute else REUSE for decision in steps)
        products = source.products if isinstance(source, Plan) else ()
        moves = velocity_steps(schedule, [*levels, 0.0][: len(steps) + 1], mode, products)
        return tuple(replace(step, weights=(), velocity=move) for step, move in zip(steps, moves, strict=True))
    return _with_weights(steps, levels, source.ratios, mode)


def _levels(sigmas: Sequence[float] | None, steps: int, mode: str) -> Sequence[float]:
    if sigmas is None:
        if mode in EXTRAPOLATING:
            raise ConfigError("sigmas", None, f"given for reuse={mode!r}, one per step")
        return range(steps, 0, -1)
    if len(sigmas) < steps:
        raise ConfigError("sigmas", f"{len(sigmas)} values", f"one per step, {steps} or more")
    return sigmas


def _with_weights(
    steps: Sequence[Decision], sigmas: Sequence[float], ratios: Sequence[float], mode: str
) -> tuple[Decision, ...]:
    result: list[Decision] = []
    computed: list[float] = []
    growth = 1.0
    for decision in steps:
        if decision.compute:
            computed.insert(0, float(sigmas[decision.step]))
            growth = 1.0
            result.append(decision)
            continue
        growth *= ratios[decision.step] if ratios else 1.0
        weights = reuse_weights(mode, float(sigmas[decision.step]), computed, growth)
        result.append(replace(decision, weights=weights))
    return tuple(result)
