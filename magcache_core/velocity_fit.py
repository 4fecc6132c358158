"""Weights of velocities by least squares over calibration's inner products, in the place of polynomials'.

Polynomials assume how velocities bend; the inner products G of the velocities of all pairs of steps tell it. They also
tell how far a run's latents are from the uncached run's: c'Gc, with c what each step's velocity still lacks in them. So
each computed step moves the latents as near to the uncached ones as its velocities allow, whatever of earlier moves was
wrong: a correction that reaches back to the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from magcache_core.plan_data import VelocityStep, computed_steps

FITTING = 4
"""Most velocities that are weighed. With three, `corrected` is nearer (docs/magcache.md has the figures)."""
PRECISION = 1e-12
"""Differences between velocities that are smaller than this, squared and relative to a velocity, are rounding."""


def fitted_steps(
    schedule: str, sigmas: Sequence[float], products: torch.Tensor, kept: int = FITTING
) -> tuple[VelocityStep, ...]:
    """A whole run ahead.

    Args:
        schedule: ``C`` and ``.``, one character per step, that begins with ``C``.
        sigmas: the noise level of each step and the final one, falling, steps + 1 values.
        products: inner products of the velocities of two steps, (steps, steps) in float64.
        kept: most velocities that are weighed.
    """
    deltas = torch.tensor([after - before for before, after in pairwise(sigmas)], dtype=products.dtype)
    unit = torch.eye(len(schedule), dtype=products.dtype)
    computed = computed_steps(schedule)
    lacking = torch.zeros_like(deltas)  # by step, what of its velocity the latents lack
    steps: list[VelocityStep] = []
    for index, (step, end) in enumerate(pairwise([*computed, len(schedule)])):
        known = computed[max(0, index + 1 - kept) : index + 1][::-1]
        nearest = torch.linalg.pinv(products[known][:, known], rtol=PRECISION, hermitian=True) @ products[known]
        lacking[step:end] += deltas[step:end]
        move = nearest @ lacking
        lacking[known] -= move
        each = nearest @ unit[:, step:end]  # (velocities, steps of the segment), what stands for each one's velocity
        moved = each * deltas[step:end]
        rest = moved.flip(1).cumsum(1).flip(1)
        estimates = -(rest + each * torch.tensor(sigmas[step:end], dtype=products.dtype))
        each[:, 0] = (move - moved[:, 1:].sum(1)) / deltas[step]
        for at in range(end - step):
            here = tuple(move.tolist()) if at == 0 else ()
            steps.append(VelocityStep(tuple(each[:, at].tolist()), here, tuple(estimates[:, at].tolist())))
    return tuple(steps)
