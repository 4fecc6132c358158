"""Variants of predict and correct, for what they are worth: ``python -m benchmarks.corrector_variants``.

Other orders of prediction and correction and blends of them, residuals that predict where velocities correct, and
the service's least squares over calibration's velocities, of two to four velocities. All in the sampling loop of
`benchmarks.correctors` with moves that are worked out here, on given schedules, against the uncached 28 Euler steps.
Options and results are those of `benchmarks.correctors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.correctors import RESIDUALS, STEPS, Line, Loop, Sampler, Velocity, main
from magcache_core import Plan, Profile, apply_mag_cache, plan, remove_mag_cache
from magcache_core.correct import lagrange
from magcache_core.plan_data import computed_steps
from magcache_core.velocity_fit import fitted_steps

Orders = Mapping[int, float]
"""By number of velocities that a polynomial goes through, its share in a blend."""
LINE: Orders = {2: 1.0}
PARABOLA: Orders = {3: 1.0}
BLENDS: dict[str, tuple[Orders, Orders | None]] = {
    "corrected": (LINE, PARABOLA),
    "predicted only": (LINE, None),
    "prediction of third order": ({3: 1.0}, PARABOLA),
    "a quarter of it": ({2: 0.75, 3: 0.25}, PARABOLA),
    "prediction a quarter constant": ({1: 0.25, 2: 0.75}, PARABOLA),
    "correction of fourth order": (LINE, {4: 1.0}),
    "half of it": (LINE, {3: 0.5, 4: 0.5}),
}
"""By name, prediction and correction."""

Moves = list[dict[int, float]]
"""For each computed step, by step the weight of its velocity in what moves the latents up to the next computed step."""


def blended(schedule: str, sigmas: Sequence[float], predict: Orders, correct: Orders | None) -> Moves:
    """The moves of a prediction and correction that are blends of polynomials."""
    computed = computed_steps(schedule)
    moves: Moves = []
    predicted: dict[int, float] = {}
    for index, (step, end) in enumerate(pairwise([*computed, len(schedule)])):
        known = computed[: index + 1][::-1]
        move: dict[int, float] = {}
        if index and correct:
            _add(move, _total(range(known[1], step), sigmas, known, correct))
            _add(move, predicted, -1.0)
        predicted = _total(range(step, end), sigmas, known, predict)
        _add(move, predicted)
        moves.append(move)
    return moves


def least_squares(schedule: str, sigmas: Sequence[float], gram: torch.Tensor, kept: int) -> Moves:
    """The service's own fit, of as many of the last velocities as are to be tried.

    Args:
        gram: mean inner products of the velocities of two steps, (steps, steps).
    """
    computed = computed_steps(schedule)
    steps = fitted_steps(schedule, sigmas, gram.double(), kept)
    return [dict(zip(computed[index::-1], steps[step].move, strict=False)) for index, step in enumerate(computed)]


def moved(schedule: str, sigmas: Sequence[float], moves: Moves) -> Sampler:
    """A run by ``moves``, one for each computed step."""

    def sample(latents: torch.Tensor, velocity: Velocity) -> torch.Tensor:
        known: dict[int, torch.Tensor] = {}
        computed = computed_steps(schedule)
        for step, move in zip(computed, moves, strict=True):
            known[step] = velocity(latents, sigmas[step])
            latents = latents + sum(weight * known[q] for q, weight in move.items())
        return latents

    return sample


def residuals_predict(transformer: Any, schedule: str, sigmas: Sequence[float]) -> Sampler:
    """Reused steps move the latents with ``linear`` residuals, and are corrected by velocities."""

    def sample(latents: torch.Tensor, velocity: Velocity) -> torch.Tensor:
        known: dict[int, torch.Tensor] = {}
        predicted = torch.zeros_like(latents)
        apply_mag_cache(transformer, Plan(schedule, "linear"), sigmas=sigmas[:-1])
        for step, (begin, end) in enumerate(pairwise(sigmas)):
            made = velocity(latents, begin)
            if schedule[step] == "C":
                known = {step: made, **known}
                if len(known) > 1:
                    again = _total(range(list(known)[1], step), sigmas, list(known), PARABOLA)
                    latents = latents + sum(weight * known[q] for q, weight in again.items()) - predicted
                predicted = torch.zeros_like(latents)
            predicted = predicted + (end - begin) * made
            latents = latents + (end - begin) * made
        remove_mag_cache(transformer)
        return latents

    return sample


def _total(steps: range, sigmas: Sequence[float], known: Sequence[int], orders: Orders) -> dict[int, float]:
    """The weights of the velocities at ``known``, newest first, in the sum over ``steps`` of a blend."""
    total: dict[int, float] = {}
    for order, share in orders.items():
        nodes = known[:order]
        for q in steps:
            weights = lagrange(sigmas[q], [sigmas[node] for node in nodes])
            _add(total, dict(zip(nodes, weights, strict=True)), share * (sigmas[q + 1] - sigmas[q]))
    return total


def _add(to: dict[int, float], weights: Mapping[int, float], factor: float = 1.0) -> None:
    for step, weight in weights.items():
        to[step] = to.get(step, 0.0) + factor * weight


def lines(profile: Profile, loop: Loop, budgets: Sequence[int]) -> Iterator[Line]:
    """(computed steps, method, schedule, how to make the images) of each line."""
    sigmas = loop.sigmas(STEPS)
    table = profile.branch().costs
    if table is None or table.velocities is None:
        raise SystemExit(f"profile {profile.name} has no inner products of velocities: it needs a calibration")

    def line(method: str, marks: str, sampler: Sampler) -> Line:
        return marks.count("C"), method, marks, partial(loop.images, sampler)

    for budget in budgets:
        tried = plan(profile, STEPS, budget=budget).schedule
        for method, (predict, correct) in BLENDS.items():
            yield line(method, tried, moved(tried, sigmas, blended(tried, sigmas, predict, correct)))
        yield line("residuals predict", tried, residuals_predict(loop.generator.transformer, tried, sigmas))
        planned = plan(profile, STEPS, budget=budget, reuse="corrected").schedule
        for whose, marks in (("tried", tried), ("planned", planned), ("residuals'", RESIDUALS[budget])):
            for kept in (2, 3, 4):
                moves = least_squares(marks, sigmas, table.velocities, kept)
                yield line(f"least squares of {kept}, {whose} schedule", marks, moved(marks, sigmas, moves))


if __name__ == "__main__":
    main("corrector_variants", __doc__, lines)
