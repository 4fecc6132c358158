"""What a reused step adds: weights of the last computed residuals, by reuse mode."""

from __future__ import annotations

from collections.abc import Sequence

from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.plan_data import COMPUTE, Plan
from magcache_core.state import Decision, MagCacheState

REUSE_MODES = ("residual", "scaled", "linear", "damped", "quadratic", "fitted")
"""``residual``: the last computed residual as it is. ``scaled``: times the product of ratios since. ``linear``: first
order in sigma through the last two computed residuals. ``damped``: half of that slope. ``quadratic``: second order
through the last three."""

ORDER = {"residual": 0, "scaled": 0, "linear": 1, "damped": 1, "quadratic": 2, "fitted": 1}
"""How many residuals beside the newest a mode wants."""

DAMPING = 0.5
"""The fraction of the slope that ``damped`` follows: extrapolating overshoots when the next computed step is far."""


def check_reuse(reuse: str) -> str:
    """Return ``reuse`` if it is one of `REUSE_MODES`; `ConfigError` otherwise."""
    if reuse not in REUSE_MODES:
        raise ConfigError("reuse", reuse, f"one of {', '.join(REUSE_MODES)}")
    return reuse


def reuse_weights(mode: str, at: float, computed: Sequence[float], growth: float = 1.0) -> tuple[float, ...]:
    """Factors of the computed residuals, newest first, that stand in for the residual at noise level ``at``.

    Args:
        mode: one of `REUSE_MODES`.
        at: sigma of the reused step.
        computed: sigmas of the steps whose residuals are at hand, newest first; the mode takes as many as it wants.
        growth: product of the ratios since the newest of them (for ``scaled``).

    Returns:
        One factor for ``residual`` and ``scaled``, two for ``linear`` and ``damped``, three for ``quadratic``;
        fewer while fewer residuals exist (the order falls to what they allow).
    """
    if mode == "scaled":
        return (growth,)
    order = min(ORDER[check_reuse(mode)], len(computed) - 1)
    if order == 0:
        return (1.0,)
    if order == 1:
        newest, before = computed[0], computed[1]
        t = (at - newest) / (newest - before)
        if mode == "damped":
            t *= DAMPING
        return (1.0 + t, -t)
    # Lagrange's polynomial through the last three points in sigma.
    a, b, c = computed[0], computed[1], computed[2]
    return (
        (at - b) * (at - c) / ((a - b) * (a - c)),
        (at - a) * (at - c) / ((b - a) * (b - c)),
        (at - a) * (at - b) / ((c - a) * (c - b)),
    )


def decisions(
    source: MagCacheConfig | Plan, sigmas: Sequence[float] | None = None, reuse: str | None = None
) -> tuple[Decision, ...]:
    """The whole trajectory ahead: one `Decision` per step.

    Args:
        source: the threshold rule's settings, or a plan.
        sigmas: the noise level of each step, falling (at least one per step; a final 0 may follow). The extrapolating
            modes need them.
        reuse: one of `REUSE_MODES`; by default what the plan says, or ``residual``.

    Raises:
        ConfigError: ``reuse`` is unknown, or sigmas are missing or too few.
    """
    if isinstance(source, Plan) and source.weights and reuse in (None, source.reuse):
        return tuple(Decision(i, not weights, weights) for i, weights in enumerate(source.weights))
    if isinstance(source, Plan):
        marks = source.schedule
        steps: list[Decision] = [Decision(i, compute=mark == COMPUTE) for i, mark in enumerate(marks)]
        ratios = source.ratios
        modes = [check_reuse(reuse)] * marks.count(COMPUTE) if reuse is not None else list(source.modes)
    else:
        state = MagCacheState(source)
        steps = [state.step() for _ in range(source.num_inference_steps)]
        ratios = source.ratios
        modes = [check_reuse(reuse or "residual")] * len(steps)
    if sigmas is None:
        if any(ORDER[mode] for mode in modes):
            raise ConfigError("sigmas", None, f"given for reuse={reuse or modes[0]!r}, one per step")
        sigmas = range(len(steps), 0, -1)
    if len(sigmas) < len(steps):
        raise ConfigError("sigmas", f"{len(sigmas)} values", f"one per step, {len(steps)} or more")
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
        mode = modes[sum(1 for d in result if d.compute) - 1]
        weights = reuse_weights(mode, float(sigmas[decision.step]), computed, growth)
        result.append(Decision(decision.step, False, weights, decision.accumulated_error))
    return tuple(result)
