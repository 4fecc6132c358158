"""Weights by least squares against a slow loop with vectors, and where they come from."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from magcache_core import ConfigError, Plan, decisions, fill, load_profile, plan
from magcache_core.velocity_fit import FITTING, fitted_steps
from tests.magcache_core.slow_corrector import levels
from tests.magcache_core.slow_least_squares import SlowLeastSquares, products, vectors

SCHEDULES = ["C", "CC", "C....", "CCCCCC", "C.C...CC..C.", "CC..C....C.CC..."]


def field(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth velocity, other in every place and at every level."""
    return torch.sin(2 * latents + 3 * sigma) - latents.roll(1) * math.exp(-sigma)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moves_estimates_and_euler_steps_are_the_slow_loops(schedule: str) -> None:
    sigmas = levels(len(schedule))
    slow = SlowLeastSquares(sigmas, schedule)
    expected = moved = by_steps = torch.linspace(-1, 1, 5, dtype=torch.float64)
    known: list[torch.Tensor] = []
    made = decisions(Plan(schedule, "least_squares", products=products(len(schedule))), sigmas)
    for step, one in enumerate(made):
        assert one.velocity is not None
        assert one.compute == bool(one.velocity.move) == (schedule[step] == "C")
        expected = slow.advance(expected, lambda x=moved, s=sigmas[step]: field(x, s))
        if one.compute:
            known = [field(moved, sigmas[step]), *known][: len(one.velocity.move)]
            moved = moved + sum(w * v for w, v in zip(one.velocity.move, known, strict=True))
        estimate = moved + sum(w * v for w, v in zip(one.velocity.estimate, known, strict=True))
        torch.testing.assert_close(estimate, slow.estimates[step], rtol=1e-6, atol=1e-6)
        euler = sum(w * v for w, v in zip(one.velocity.velocity, known, strict=True))
        by_steps = by_steps + (sigmas[step + 1] - sigmas[step]) * euler
        torch.testing.assert_close(by_steps, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
    assert max(len(one.velocity.move) for one in made if one.velocity) == min(schedule.count("C"), FITTING)


def test_each_computed_step_leaves_the_latents_as_near_as_its_velocities_allow() -> None:
    schedule, steps = "CC.C...C..C..", 13
    sigmas, vector = levels(steps), torch.from_numpy(vectors(steps))
    truth = torch.tensor([b - a for a, b in pairwise(sigmas)], dtype=torch.float64)
    computed = [step for step, mark in enumerate(schedule) if mark == "C"]
    latents = torch.zeros(40, dtype=torch.float64)
    made = fitted_steps(schedule, sigmas, vector.T @ vector)
    for index, end in enumerate([*computed[1:], steps]):
        known = vector[:, computed[max(0, index - 3) : index + 1][::-1]]
        latents = latents + known @ torch.tensor(made[computed[index]].move, dtype=torch.float64)
        left = vector[:, :end] @ truth[:end] - latents
        assert (known.T @ left).abs().max() < 1e-9, "what is left is at right angles to all that was at hand"


def test_where_every_step_computes_it_is_eulers_method() -> None:
    sigmas = levels(7)
    for index, step in enumerate(fitted_steps("C" * 7, sigmas, torch.tensor(products(7), dtype=torch.float64))):
        assert step.move == pytest.approx((sigmas[index + 1] - sigmas[index], 0, 0, 0)[: index + 1], abs=1e-9)


def test_velocities_that_do_not_change_are_shared_out_without_blowing_up() -> None:
    made = fitted_steps("CCCC..", levels(6), torch.ones(6, 6, dtype=torch.float64))
    assert sum(sum(step.move) for step in made) == pytest.approx(-1.0)
    assert np.abs([weight for step in made for weight in step.move]).max() <= 1.0


def test_a_plan_carries_the_profiles_inner_products_at_its_own_number_of_steps() -> None:
    profile = load_profile("flux-tiny")
    table = profile.branch().costs
    assert table is not None
    assert table.velocities is not None
    assert plan(profile, budget=10, reuse="least_squares").products == tuple(map(tuple, table.velocities.tolist()))
    marks = "C..C..C..C.C"
    filled = fill(profile, marks, "least_squares")
    assert np.array(filled.products).shape == (12, 12)
    sigmas = levels(12)
    assert decisions(filled, sigmas) != decisions(Plan(marks, "corrected"), sigmas)
    assert fill(profile, marks, "corrected").products == ()


def test_without_inner_products_it_is_corrected() -> None:
    sigmas, marks = levels(12), "C..C..C..C.C"
    assert decisions(Plan(marks, "least_squares"), sigmas) == decisions(Plan(marks, "corrected"), sigmas)
    assert fill(load_profile("flux.1-dev"), marks, "least_squares").products == ()


def test_inner_products_of_another_number_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"products.*3 rows.*one per step, 2"):
        Plan("C.", "least_squares", products=products(3))
