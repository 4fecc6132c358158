"""Profiles whose costs nothing orders."""

from __future__ import annotations

import torch

from magcache_core import BranchCurve, Profile
from magcache_core.costs import CostTable, empty_table


def measured_profile(steps: int, max_skip: int, seed: int) -> Profile:
    """A profile with random costs: nothing about them is smooth or monotone."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for mode in ("residual", "linear"):
        table = empty_table(steps, max_skip)
        shape = (steps, 1 if mode == "residual" else max_skip + 2, max_skip + 1)
        costs = torch.rand(shape, generator=generator)
        a, g, length = (torch.arange(n) for n in table.shape)
        exists = (a[:, None, None] + length < steps) & (length > 0)
        if mode == "linear":
            exists = exists & (g[:, None] <= a[:, None, None]) & ((g[:, None] > 0) | (a[:, None, None] == 0))
        tables[mode] = torch.where(exists, costs, table)
    costs_table = CostTable(tables, tables, torch.eye(steps, dtype=torch.float64), torch.ones(steps))
    curve = BranchCurve((1.0,) * steps, costs=costs_table)
    return Profile("random", "m", "T", steps, 64, 64, {"cond": curve}, max_skip_steps=max_skip, retention_ratio=0.0)
