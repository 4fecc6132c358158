"""Weights of predictions and corrections against the slow oracle, and what they are good for."""

import math
import random

import pytest
import torch

from magcache_core.correct import VELOCITY_MODES, evenly_corrected, velocity_steps
from magcache_core.velocity_costs import velocity_costs
from tests.magcache_core.slow_corrector import slow_run

SCHEDULES = ["C", "CC", "C.", "C....", "CCCCCC", "C..C..C..C", "C.C...CC..C.", "CC..C....C.CC..."]


def levels(steps: int) -> list[float]:
    """Shifted as FLUX's are, not evenly spaced."""
    return [3 * t / (1 + 2 * t) for t in (1 - i / steps for i in range(steps))] + [0.0]


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


def test_costs_are_what_the_segments_leave_in_the_latents() -> None:
    """Against velocities themselves, for a sample of segments."""
    steps, lengths = 12, 6
    sigmas = levels(steps)
    torch.manual_seed(0)
    velocities = torch.randn(steps, 9, dtype=torch.float64).cumsum(dim=0)
    costs = velocity_costs(velocities @ velocities.T, sigmas, lengths)
    assert costs.shape == (steps, lengths + 1, lengths)

    def cost(a: int, g: int, length: int) -> float:
        end = a + length + 1
        before = [a - g] if g else []
        total = 0.0
        for nodes in ([a, *before], [end, a, *before]):
            if end == steps and len(nodes) == 2 + len(before):
                continue
            orders = torch.arange(len(nodes))
            at_nodes = torch.tensor([sigmas[node] for node in nodes], dtype=torch.float64)
            coefficients = torch.linalg.solve(at_nodes[:, None] ** orders, velocities[nodes])
            drift = torch.zeros(9, dtype=torch.float64)
            for q in range(a, end):
                made = torch.tensor(sigmas[q], dtype=torch.float64) ** orders @ coefficients
                drift += (sigmas[q + 1] - sigmas[q]) * (made - velocities[q])
            total += drift.square().sum().item()
        return total

    rng = random.Random(0)
    for _ in range(60):
        a = rng.randrange(steps)
        g = rng.randrange(1, lengths + 1) if a else 0
        length = rng.randrange(lengths)
        found = costs[a, g, length].item()
        if g > a or a + length >= steps:
            assert math.isinf(found)
        else:
            assert found == pytest.approx(cost(a, g, length), rel=1e-6, abs=1e-9)
