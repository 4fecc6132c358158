"""Measured costs at other step counts, and in the profile's file."""

from __future__ import annotations

import math

import pytest
import torch

from magcache_core import plan
from magcache_core.costs import CostTable, empty_table
from magcache_core.profile_data import Profile, parse, to_json


def test_measured_costs_carry_over_to_other_step_counts() -> None:
    """Costs are a function of noise levels: a smooth one is met again at twice the steps, half the length."""
    steps, max_skip = 21, 8
    a, g, length = torch.meshgrid(*(torch.arange(n) for n in (steps, max_skip + 2, max_skip + 1)), indexing="ij")
    smooth = (length * (1 + 0.05 * a)).float()
    exists = (a + length < steps) & (g <= a) & ((g > 0) | (a == 0))
    table = torch.where(exists, smooth, empty_table(steps, max_skip))
    costs = CostTable(
        {}, {"linear": table, "residual": table}, torch.eye(steps, dtype=torch.float64), torch.ones(steps)
    )
    finer = costs.resampled("linear", 41, 9)
    assert finer.shape == (41, 10, 9)
    assert finer[20, 4, 6] == pytest.approx(3 * (1 + 0.05 * 10))
    assert finer[20, 3, 5] == pytest.approx(2.5 * (1 + 0.05 * 10))
    assert math.isinf(finer[36, 2, 5])
    assert torch.equal(costs.resampled("linear", 21, 9)[exists], table[exists])


def test_costs_survive_the_file_and_plan_alike(measured: Profile) -> None:
    read = parse(to_json(measured), "tiny.json")
    before, after = measured.branch().costs, read.branch().costs
    assert before is not None
    assert after is not None
    for mode in before.segments:
        finite = torch.isfinite(before.segments[mode]) & torch.isfinite(after.segments[mode])
        torch.testing.assert_close(before.segments[mode][finite], after.segments[mode][finite], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(before.velocities, after.velocities, rtol=1e-9, atol=0.0)
    for reuse in ("residual", "linear", "fitted"):
        assert plan(read, budget=4, reuse=reuse).schedule == plan(measured, budget=4, reuse=reuse).schedule
        assert plan(read, budget=4, reuse=reuse).unit == "latent"
