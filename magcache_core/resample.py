"""Carry a curve that was calibrated at one step count over to another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise


def nearest_index(step: int, steps: int, length: int) -> int:
    """The index into a curve of ``length`` entries that step ``step`` of ``steps`` takes.

    round(step * (length - 1) / (steps - 1)), halves to even, as the MagCache authors' scripts and diffusers do;
    a run of one step takes the last entry, also as they do.
    """
    if steps == 1:
        return length - 1
    return round(step * (length - 1) / (steps - 1))


def positions(steps: int, length: int) -> list[float]:
    """Where each of ``steps`` steps falls among the indices of a curve of ``length`` entries, not rounded."""
    if steps == 1:
        return [length - 1.0]
    return [i * (length - 1) / (steps - 1) for i in range(steps)]


def resample_over_sigma(
    ratios: Sequence[float], sigmas: Sequence[float], target_sigmas: Sequence[float]
) -> tuple[float, ...]:
    """``ratios`` at another run's sigmas, by interpolating the cumulative log-magnitude.

    A ratio is the growth of the residual's norm between two neighbouring steps, so the log of its running product is a
    function of sigma alone; a finer run walks the same function in smaller steps, where nearest-index resampling would
    repeat whole steps' growth.

    Args:
        ratios: the calibrated curve, S values.
        sigmas: the noise level of each of its steps, falling, at least S values (a final 0 is ignored).
        target_sigmas: the noise levels of the new run's N steps, falling.

    Returns:
        N ratios; the first is that of the curve.
    """
    points = list(sigmas[: len(ratios)])
    logs = [0.0]
    for ratio in ratios[1:]:
        logs.append(logs[-1] + math.log(ratio))
    levels = [interpolate(points, logs, sigma) for sigma in target_sigmas]
    return (ratios[0], *(math.exp(b - a) for a, b in pairwise(levels)))


def interpolate(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Piecewise linear interpolation of ``values`` over falling ``points``; constant outside their range."""
    if at >= points[0]:
        return values[0]
    if at <= points[-1]:
        return values[-1]
    right = bisect_right(points, -at, key=lambda point: -point)
    left = right - 1
    t = (at - points[left]) / (points[right] - points[left])
    return values[left] + t * (values[right] - values[left])
