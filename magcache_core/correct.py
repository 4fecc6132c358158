"""Predict and correct in velocity: the weights by which computed velocities carry the latents over skipped steps.

Reuse seen as a multistep integrator. The steps after a computed one move the latents along the line through the last
two computed velocities (predict). That line's error stays in the latents until the next step is computed: then the
steps just passed are summed again along the parabola through the last three velocities, and the difference is added
(correct). Noise levels and the schedule are known when a request arrives, so all weights are; no step looks at data.

Prediction and correction are the Adams-Bashforth and Adams-Moulton methods' (Hairer, Norsett, Wanner: Solving Ordinary
Differential Equations I, III.1), with sums over the skipped steps in the place of integrals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from magcache_core.plan_data import Products, VelocityStep, Weights, computed_steps, schedule_of
from magcache_core.velocity_fit import fitted_steps

LEAST_SQUARES = "least_squares"
VELOCITY_MODES = ("corrected", "integrated", LEAST_SQUARES)
"""``corrected`` sums what the uncached run sums, and is the uncached run where every step computes. ``integrated``
takes the polynomials' integrals over noise levels instead: nearer to the differential equation's solution, which is not
what the uncached run yields. ``least_squares`` weighs velocities by calibration's inner products, where they are known
(`magcache_core.velocity_fit`), and is ``corrected`` where they are not."""
PREDICTING = 2
CORRECTING = 3
"""Most velocities that a prediction and a correction are put through."""


def lagrange(at: Any, nodes: Sequence[Any]) -> tuple[Any, ...]:
    """The weights of the values at ``nodes`` in their interpolating polynomial's value at ``at``.

    Noise levels may be numbers, or tensors of equal shapes.
    """
    weights = []
    for index, node in enumerate(nodes):
        others = [*nodes[:index], *nodes[index + 1 :]]
        weights.append(math.prod((at - other) / (node - other) for other in others))
    return tuple(weights)


def mean_over(begin: Any, end: Any, nodes: Sequence[Any]) -> tuple[Any, ...]:
    """The weights in the polynomial's mean from ``begin`` to ``end``, exact up to third order (Simpson's rule)."""
    at = (lagrange(begin, nodes), lagrange((begin + end) / 2, nodes), lagrange(end, nodes))
    return tuple((a + 4 * b + c) / 6 for a, b, c in zip(*at, strict=True))


def velocity_steps(
    schedule: str, sigmas: Sequence[float], mode: str = "corrected", products: Products = ()
) -> tuple[VelocityStep, ...]:
    """A whole run ahead.

    Args:
        schedule: ``C`` and ``.``, one character per step, that begins with ``C``.
        sigmas: the noise level of each step and the final one, falling, steps + 1 values.
        mode: one of `VELOCITY_MODES`.
        products: inner products of the velocities of two steps, steps x steps, for ``least_squares``.
    """
    if mode == LEAST_SQUARES and products:
        return fitted_steps(schedule, sigmas, torch.tensor(products, dtype=torch.float64))
    run = _Run(sigmas, mode == "integrated")
    computed = computed_steps(schedule)
    steps: list[VelocityStep] = []
    for index, (step, end) in enumerate(zip(computed, [*computed[1:], len(schedule)], strict=True)):
        known = computed[max(0, index + 1 - CORRECTING) : index + 1][::-1]
        correction = run.correction(known)
        ahead = [_padded(run.weights(q, known[:PREDICTING]), len(known)) for q in range(step, end)]
        rest = [run.total(range(q, end), ahead[q - step :]) for q in range(step, end)]
        for q in range(step, end):
            velocity = ahead[q - step]
            if q == step:
                velocity = _sum(velocity, _scaled(correction, 1 / run.delta(q)))
            move = _sum(correction, rest[0]) if q == step else ()
            here = _padded(lagrange(run.sigmas[q], [run.sigmas[k] for k in known[:PREDICTING]]), len(known))
            steps.append(VelocityStep(velocity, move, _scaled(_sum(rest[q - step], _scaled(here, run.sigmas[q])), -1)))
    return tuple(steps)


def evenly_corrected(steps: int, budget: int) -> str:
    """The schedule for ``budget`` computed steps that needs no calibration: even, with only the last step after them.

    The step before the last computes, because no later one corrects what is predicted from the last computed step on.
    """
    computed = {round(i * (steps - 2) / max(budget - 1, 1)) for i in range(budget)} if budget < steps else range(steps)
    return schedule_of(computed, steps)


@dataclass(frozen=True)
class _Run:
    sigmas: Sequence[float]
    integrates: bool

    def delta(self, step: int) -> float:
        return self.sigmas[step + 1] - self.sigmas[step]

    def weights(self, step: int, known: Sequence[int]) -> Weights:
        """Of the velocities of the computed steps ``known``, for step ``step``'s share of its segment."""
        nodes = [self.sigmas[k] for k in known]
        begin, end = self.sigmas[step], self.sigmas[step + 1]
        return mean_over(begin, end, nodes) if self.integrates else lagrange(begin, nodes)

    def total(self, steps: Sequence[int], weights: Sequence[Weights]) -> Weights:
        """The weights of several steps as one move of the latents."""
        moved = [[self.delta(step) * value for value in row] for step, row in zip(steps, weights, strict=True)]
        return tuple(sum(column) for column in zip(*moved, strict=True))

    def correction(self, known: Sequence[int]) -> Weights:
        """What was predicted between the last two computed steps, summed again with the newest velocity, less that."""
        if len(known) < 2:
            return (0.0,) * len(known)
        passed = range(known[1], known[0])
        again = self.total(passed, [self.weights(step, known) for step in passed])
        predicted = self.total(passed, [self.weights(step, known[1 : 1 + PREDICTING]) for step in passed])
        return _sum(again, _scaled((0.0, *predicted), -1))


def _padded(weights: Weights, length: int) -> Weights:
    return weights + (0.0,) * (length - len(weights))


def _scaled(weights: Weights, factor: float) -> Weights:
    return tuple(factor * weight for weight in weights)


def _sum(a: Weights, b: Weights) -> Weights:
    return tuple(x + y for x, y in zip(a, b, strict=True))
