"""What predicting and correcting costs, against the velocities themselves."""

from __future__ import annotations

import math
import random

import pytest
import torch

from magcache_core.velocity_costs import FOLLOWED, run_costs, segment_errors, velocity_costs
from tests.magcache_core.slow_corrector import SlowRun, levels


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


def test_a_whole_run_costs_what_it_leaves_and_what_its_evaluations_see() -> None:
    """Against a run written out, whose velocities don't depend on its latents."""
    steps = 12
    sigmas = levels(steps)
    torch.manual_seed(0)
    velocities = torch.randn(steps, 9, dtype=torch.float64).cumsum(dim=0)
    errors = segment_errors(sigmas, steps)
    for marks in ("C" * steps, "C...CC..C...", "CC.....C.C..", "C.........C.", "C..........."):
        computed = [step for step, mark in enumerate(marks) if mark == "C"]
        run, reused, euler = SlowRun(sigmas, marks), torch.zeros(9, dtype=torch.float64), torch.zeros(9).double()
        expected = 0.0
        for step in range(steps):
            if step in computed[1:]:
                end = ([*computed, steps])[computed.index(step) + 1]
                expected += (FOLLOWED * (sigmas[step] - sigmas[end])) ** 2 * (reused - euler).square().sum().item()
            reused = run.advance(reused, lambda step=step: velocities[step])
            euler = euler + (sigmas[step + 1] - sigmas[step]) * velocities[step]
        expected += (reused - euler).square().sum().item()
        found = run_costs(velocities @ velocities.T, sigmas, errors, torch.tensor([computed]))
        assert found.tolist() == pytest.approx([expected], rel=1e-6, abs=1e-9)
