"""Weights of predictions and corrections against the slow oracle, and what they are good for."""

import math

import pytest
import torch

from magcache_core.correct import VELOCITY_MODES, evenly_corrected, velocity_steps
from tests.magcache_core.slow_corrector import levels, slow_run

SCHEDULES = ["C", "CC", "C.", "C....", "CCCCCC", "C..C..C..C", "C.C...CC..C.", "CC..C....C.CC..."]


def field(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth velocity, other in every place and at every level."""
    return torch.sin(2 * latents + 3 * sigma) - latents.roll(1) * math.exp(-sigma)


def start() -> torch.Tensor:
    return torch.linspace(-1, 1, 5, dtype=torch.float64)


@pytest.mark.parametrize("mode", VELOCITY_MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moves_and_estimates_are_the_slow_oracles(schedule: str, mode: str) -> None:
    sigmas = levels(len(schedule))
    expected, estimates = slow_run(
        lambda x, i: field(x, sigmas[i]), start(), sigmas, schedule, integrated=mode == "integrated"
    )
    latents, known = start(), []
    for i, step in enumerate(velocity_steps(schedule, sigmas, mode)):
        assert (schedule[i] == "C") == bool(step.move)
        if step.move:
            known = [field(latents, sigmas[i]), *known][:3]
            assert len(known) == len(step.move)
            latents = latents + sum(w * v for w, v in zip(step.move, known, strict=True))
        estimate = latents + sum(w * v for w, v in zip(step.estimate, known, strict=True))
        torch.testing.assert_close(estimate, estimates[i], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latents, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", VELOCITY_MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_steps_with_the_weighted_velocities_come_to_the_same(schedule: str, mode: str) -> None:
    sigmas = levels(len(schedule))
    expected, _ = slow_run(lambda x, i: field(x, sigmas[i]), start(), sigmas, schedule, integrated=mode == "integrated")
    latents, known = start(), []
    for i, step in enumerate(velocity_steps(schedule, sigmas, mode)):
        if schedule[i] == "C":
            known = [field(latents, sigmas[i]), *known][:3]
        velocity = sum(w * v for w, v in zip(step.velocity, known, strict=True))
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    torch.testing.assert_close(latents, expected, rtol=1e-9, atol=1e-9)


def test_where_every_step_computes_it_is_eulers_method() -> None:
    sigmas = levels(7)
    for i, step in enumerate(velocity_steps("C" * 7, sigmas)):
        assert step.velocity == pytest.approx((1.0, 0.0, 0.0)[: i + 1])
        assert step.move == pytest.approx((sigmas[i + 1] - sigmas[i], 0.0, 0.0)[: i + 1])


def test_velocities_on_a_parabola_are_summed_exactly_once_corrected() -> None:
    """Between the second computed step and the last; the first segment is corrected along a line only."""
    sigmas, schedule = levels(14), "CC...C....C.CC"

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        s = sigmas[step]
        return torch.tensor([1 - 2 * s + 3 * s * s], dtype=torch.float64)

    found, _ = slow_run(velocity, torch.zeros(1), sigmas, schedule)
    euler, _ = slow_run(velocity, torch.zeros(1), sigmas, "C" * 14)
    torch.testing.assert_close(found, euler, rtol=1e-12, atol=1e-12)


def test_integrated_with_ten_evaluations_is_nearer_to_the_solution_than_eulers_28_steps() -> None:
    def end(schedule: str, mode: str) -> torch.Tensor:
        sigmas = levels(len(schedule))
        return slow_run(lambda x, i: field(x, sigmas[i]), start(), sigmas, schedule, mode == "integrated")[0]

    truth = end("C" * 400, "integrated")
    few = (end("C..C..C..C..C.C..C..C..C..C.", "integrated") - truth).norm()
    assert few < 0.5 * (end("C" * 28, "corrected") - truth).norm()


@pytest.mark.parametrize(
    ("steps", "budget", "schedule"),
    [
        (28, 10, "C..C..C..C..C.C..C..C..C..C."),
        (28, 6, "C....C....C.....C....C....C."),
        (28, 28, "C" * 28),
        (28, 1, "C" + "." * 27),
        (5, 2, "C..C."),
        (2, 1, "C."),
    ],
)
def test_even_schedules_end_with_the_step_before_the_last(steps: int, budget: int, schedule: str) -> None:
    assert evenly_corrected(steps, budget) == schedule


def test_every_even_schedule_has_its_budget() -> None:
    for steps in range(1, 60):
        for budget in range(1, steps + 1):
            made = evenly_corrected(steps, budget)
            assert len(made) == steps
            assert made.count("C") == budget
            assert made[0] == "C"
