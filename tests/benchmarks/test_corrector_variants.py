"""Moves of the variants against the service's own weights, and against runs that they must follow exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.corrector_variants import LINE, PARABOLA, blended, least_squares, moved
from magcache_core.correct import velocity_steps
from tests.magcache_core.slow_corrector import levels

SCHEDULE = "C.C...CC..C."


def test_a_line_and_a_parabola_are_what_the_service_does() -> None:
    sigmas = levels(len(SCHEDULE))
    made = [step.move for step in velocity_steps(SCHEDULE, sigmas) if step.move]
    for move, expected in zip(blended(SCHEDULE, sigmas, LINE, PARABOLA), made, strict=True):
        newest_first = [move[step] for step in sorted(move, reverse=True)]
        assert newest_first == pytest.approx(list(expected))


def test_a_correction_of_fourth_order_sums_a_cubic_exactly() -> None:
    sigmas, schedule = levels(14), "CCCC..C...C.CC"

    def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.tensor([1 - 2 * sigma + 3 * sigma**3], dtype=torch.float64)

    start = torch.zeros(1, dtype=torch.float64)
    moves = blended(schedule, sigmas, LINE, {4: 1.0})
    euler = sum((b - a) * velocity(start, a) for a, b in pairwise(sigmas))
    torch.testing.assert_close(moved(schedule, sigmas, moves)(start, velocity), euler)


def test_least_squares_bring_velocities_of_three_dimensions_where_every_step_computed_would() -> None:
    sigmas = levels(len(SCHEDULE))
    generator = torch.Generator().manual_seed(0)
    curves = torch.stack([torch.tensor(sigmas[:-1], dtype=torch.float64) ** power for power in range(3)], dim=1)
    velocities = curves @ torch.randn(3, 8, generator=generator, dtype=torch.float64)  # (steps, places)

    def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return velocities[sigmas.index(sigma)]

    gram = velocities @ velocities.T
    start = torch.zeros(8, dtype=torch.float64)
    euler = sum((b - a) * velocities[step] for step, (a, b) in enumerate(pairwise(sigmas)))
    moves = least_squares(SCHEDULE, sigmas, gram, kept=3)
    torch.testing.assert_close(moved(SCHEDULE, sigmas, moves)(start, velocity), euler, rtol=1e-4, atol=1e-4)
