"""Reuse weights by least squares: which mix of the computed residuals is closest to the one that is skipped.

Calibration keeps the inner products of the residuals of all pairs of steps. They determine, for any schedule, the
weights with the least expected squared error, by the normal equations; no further measurement is needed. Fixed
extrapolation formulas assume how residuals bend; this reads it off the model.
"""

from __future__ import annotations

import torch

from magcache_core.plan_data import COMPUTE
from magcache_core.resample import positions

RIDGE = 1e-3
"""Pull towards plain reuse, relative to the scale of the inner products: computed residuals carry the drift of the
reused steps before them, which large weights of opposite sign would amplify."""


def resample_gram(gram: torch.Tensor, steps: int) -> torch.Tensor:
    """Inner products at another step count, (steps, steps), by interpolation between the calibrated run's steps."""
    length = gram.shape[0]
    if steps == length:
        return gram
    at = torch.tensor(positions(steps, length), dtype=gram.dtype)
    low = at.floor().long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    part = at - low
    mix = torch.zeros(steps, length, dtype=gram.dtype)
    rows = torch.arange(steps)
    mix[rows, low] += 1 - part
    mix[rows, high] += part
    return mix @ gram @ mix.T


def fitted_weights(
    gram: torch.Tensor, schedule: str, order: int = 2, ridge: float = RIDGE
) -> tuple[tuple[float, ...], ...]:
    """Weights of the last computed residuals, newest first, for each step; empty for computed steps.

    Args:
        gram: inner products at the schedule's steps, (steps, steps).
        schedule: ``C`` and ``.``.
        order: most residuals beside the newest to use.
        ridge: see `RIDGE`.
    """
    computed: list[int] = []
    known: dict[int, list[int]] = {}  # by reused step
    for step, mark in enumerate(schedule):
        if mark == COMPUTE:
            computed.insert(0, step)
        else:
            known[step] = computed[: order + 1]
    weights: dict[int, tuple[float, ...]] = {}
    for count in {len(residuals) for residuals in known.values()}:
        steps = [step for step, residuals in known.items() if len(residuals) == count]
        solved = _solve(gram, torch.tensor(steps), torch.tensor([known[step] for step in steps]), ridge)
        weights.update(zip(steps, map(tuple, solved.tolist()), strict=True))
    return tuple(weights.get(step, ()) for step in range(len(schedule)))


def least_squares(gram: torch.Tensor, step: int, known: list[int], ridge: float = RIDGE) -> tuple[float, ...]:
    """Weights of the residuals of the steps ``known``, newest first, that come closest to that of ``step``."""
    return tuple(_solve(gram, torch.tensor([step]), torch.tensor([known]), ridge)[0].tolist())


def _solve(gram: torch.Tensor, steps: torch.Tensor, known: torch.Tensor, ridge: float) -> torch.Tensor:
    """Weights, (n, k), of the residuals ``known`` (n, k) for each of ``steps`` (n,).

    The correction d to plain reuse minimises |R_step - R_newest - sum d_k R_k|^2 + ridge * scale * |d|^2.
    """
    inner = gram[known[:, :, None], known[:, None, :]]  # (n, k, k)
    target = gram[known, steps[:, None]] - gram[known, known[:, :1]]
    scale = inner.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    ridged = inner + ridge * scale * torch.eye(known.shape[1], dtype=gram.dtype)
    weights: torch.Tensor = torch.linalg.solve(ridged, target)
    weights[:, 0] += 1
    return weights
