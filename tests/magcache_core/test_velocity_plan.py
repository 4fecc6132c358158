"""Schedules that are the best as a whole, against all there are."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from magcache_core.correct import evenly_corrected
from magcache_core.velocity_costs import run_costs, segment_errors
from magcache_core.velocity_plan import best_as_a_whole
from tests.magcache_core.slow_corrector import levels

STEPS = 12


def smooth_products(seed: int) -> torch.Tensor:
    """Inner products of velocities that bend as a model's do: slow waves in many directions."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.outer(torch.tensor(levels(STEPS)[:-1], dtype=torch.float64), torch.arange(1.0, 7.0).double()).cos()
    velocities = waves @ torch.randn(6, 40, dtype=torch.float64, generator=generator)
    return velocities @ velocities.T


def cost(gram: torch.Tensor, marks: str, longest: int) -> float:
    sigmas = levels(STEPS)
    computed = torch.tensor([[step for step, mark in enumerate(marks) if mark == "C"]])
    return float(run_costs(gram, sigmas, segment_errors(sigmas, longest + 1), computed))


def all_schedules(budget: int, longest: int, forced: list[bool]) -> list[str]:
    made = []
    for chosen in combinations(range(1, STEPS), budget - 1):
        marks = "".join("C" if step in (0, *chosen) else "." for step in range(STEPS))
        if max(map(len, marks.split("C"))) <= longest and all(
            marks[step] == "C" for step in range(STEPS) if forced[step]
        ):
            made.append(marks)
    return made


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budget", "longest", "must"), [(4, 5, ()), (5, 5, (1, 2)), (6, 2, ()), (12, 5, ())])
def test_none_is_much_better_and_none_reached_by_one_move_is_better(
    seed: int, budget: int, longest: int, must: tuple[int, ...]
) -> None:
    gram, forced = smooth_products(seed), [step in must for step in range(STEPS)]
    every = {marks: cost(gram, marks, longest) for marks in all_schedules(budget, longest, forced)}
    even = evenly_corrected(STEPS, budget)
    starts = [even if even in every else next(iter(every)), next(reversed(every))]
    found = best_as_a_whole(gram, levels(STEPS), starts, longest, forced)
    assert every[found] <= min(every[start] for start in starts)
    neighbours = [marks for marks in every if sum(a != b for a, b in zip(marks, found, strict=True)) == 2]
    assert all(every[found] <= every[marks] * (1 + 1e-9) for marks in neighbours)
    better = sum(one < every[found] * (1 - 1e-9) for one in every.values())
    assert better <= 0.05 * len(every), "of all schedules, those that are better"
