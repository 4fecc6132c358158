"""The planner against brute force, and its guarantees."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magcache_core import (
    BranchCurve,
    ConfigError,
    Plan,
    Profile,
    choose,
    decisions,
    fewest_steps,
    fill,
    load_profile,
    plan,
)
from magcache_core.costs import CostTable, empty_table
from magcache_core.planner import segments
from magcache_core.velocity_costs import velocity_costs

FLUX = load_profile("flux.1-dev")


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


def schedules(steps: int, budget: int, max_skip: int, retained: int) -> list[str]:
    """All schedules with ``budget`` computed steps that respect K and retention."""
    found = []
    for chosen in itertools.combinations(range(1, steps), budget - 1):
        marks = "".join("C" if i == 0 or i in chosen else "." for i in range(steps))
        if "." * (max_skip + 1) not in marks and marks.startswith("C" * retained):
            found.append(marks)
    return found


def total(profile: Profile, marks: str, mode: str) -> float:
    """The predicted error of a schedule, segment by segment."""
    table = profile.branches["cond"].costs
    assert table is not None
    computed = [i for i, mark in enumerate(marks) if mark == "C"]
    squares = 0.0
    for k, a in enumerate(computed):
        length = (computed[k + 1] if k + 1 < len(computed) else len(marks)) - a - 1
        gap = a - computed[k - 1] if k else 0
        squares += float(table.segments[mode][a, gap, length]) ** 2
    return math.sqrt(squares)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(4, 9), st.sampled_from(["residual", "linear"]), st.data())
def test_no_schedule_is_better_than_the_plan(seed: int, steps: int, reuse: str, data: st.DataObject) -> None:
    profile = measured_profile(steps, 3, seed)
    budget = data.draw(st.integers(math.ceil(steps / 4), steps))
    found = plan(profile, budget=budget, reuse=reuse)
    best = min(total(profile, marks, reuse) for marks in schedules(steps, budget, 3, 1))
    assert found.predicted_error == pytest.approx(best, abs=1e-5)
    assert total(profile, found.schedule, reuse) == pytest.approx(best, abs=1e-5)
    assert found.computed == budget


@given(
    st.lists(st.floats(0.8, 1.25), min_size=28, max_size=28),
    st.integers(1, 60),
    st.integers(0, 8),
    st.floats(0, 1),
    st.sets(st.integers(0, 27), max_size=3),
    st.data(),
)
def test_guarantees_on_ratios(
    ratios: list[float], steps: int, max_skip: int, retention: float, protected: set[int], data: st.DataObject
) -> None:
    profile = replace(
        FLUX,
        branches={"cond": BranchCurve(tuple(ratios))},
        max_skip_steps=max_skip,
        retention_ratio=retention,
        protected_steps=tuple(sorted(protected)),
    )
    config = profile.config(steps)
    with pytest.raises(ConfigError, match="an integer from") as refused:
        plan(profile, steps, budget=0)
    low = int(refused.value.allowed.split()[3])
    budget = data.draw(st.integers(low, steps))
    found = plan(profile, steps, budget=budget)
    assert found.computed == budget
    assert found.schedule.startswith("C" * max(config.retained_steps, 1))
    assert all(found.schedule[step] == "C" for step in config.protected)
    assert "." * (max_skip + 1) not in found.schedule
    assert plan(profile, steps, budget=budget) == found
    if budget < steps:
        assert plan(profile, steps, budget=budget + 1).predicted_error <= found.predicted_error + 1e-6
    within = plan(profile, steps, max_error=found.predicted_error + 1e-6)
    assert within.computed <= budget
    assert within.predicted_error <= found.predicted_error + 1e-6


def test_a_budget_that_no_schedule_has_is_refused_with_the_range() -> None:
    with pytest.raises(ConfigError, match="an integer from 7 to 28"):
        plan(FLUX, budget=6)
    with pytest.raises(ConfigError, match="not both"):
        plan(FLUX)
    with pytest.raises(ConfigError, match="not both"):
        plan(FLUX, budget=9, max_error=1.0)
    with pytest.raises(ConfigError, match="max_error"):
        plan(FLUX, max_error=-1.0)
    with pytest.raises(ConfigError, match="reuse"):
        plan(FLUX, budget=9, reuse="cubic")


def test_no_error_allowed_computes_every_step() -> None:
    assert plan(replace(FLUX, protected_steps=()), max_error=0.0).predicted_error == 0.0


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


def test_a_plan_becomes_decisions() -> None:
    made = Plan("CC..C.", "linear")
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.3, 0.1]
    found = decisions(made, sigmas)
    assert "".join("C" if d.compute else "." for d in found) == made.schedule
    assert found[2].weights == pytest.approx((2.0, -1.0))
    assert found[5].weights == pytest.approx((1.4, -0.4))
    assert decisions(made, sigmas, reuse="residual")[2].weights == (1.0,)
    for wrong in ("", ".C", "CX"):
        with pytest.raises(ConfigError, match="schedule"):
            Plan(wrong)
    with pytest.raises(ConfigError, match="weights"):
        Plan("CC.", "fitted", weights=((), ()))


def test_the_shipped_profiles_error_falls_with_the_budget() -> None:
    profile = load_profile("flux-tiny")
    for reuse in ("residual", "linear", "fitted"):
        errors = [plan(profile, budget=budget, reuse=reuse).predicted_error for budget in range(4, 29)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0.0


@given(
    st.sampled_from(["flux.1-dev", "flux-tiny"]),
    st.integers(1, 60),
    st.none() | st.integers(0, 20),
    st.none() | st.floats(0, 1),
)
def test_the_fewest_steps_are_the_smallest_budget(
    name: str, steps: int, max_skip_steps: int | None, retention_ratio: float | None
) -> None:
    profile = load_profile(name)
    bounds = {"max_skip_steps": max_skip_steps, "retention_ratio": retention_ratio}
    fewest = fewest_steps(profile, steps, **bounds)
    found = plan(profile, steps, budget=fewest, **bounds)
    assert (found.computed, len(found.schedule)) == (fewest, steps)
    assert math.isfinite(found.predicted_error), "a segment longer than any that was measured"
    with pytest.raises(ConfigError, match=f"from {fewest} to {steps}"):
        plan(profile, steps, budget=fewest - 1, **bounds)


@pytest.mark.parametrize("steps", range(4, 51))
def test_the_rule_has_a_finite_error_at_every_step_count(steps: int) -> None:
    """Few steps of a 28-step profile reuse over longer stretches than any measured; a reply must be a number."""
    made = choose(load_profile("flux-tiny"), steps, threshold=0.24, max_skip_steps=5, retention_ratio=0.1)
    assert math.isfinite(made.predicted_error)


def test_a_longer_run_than_measured_costs_more() -> None:
    profile = load_profile("flux-tiny")
    errors = [fill(profile, "CCC" + "." * n + "C" * (9 - n), "residual").predicted_error for n in range(1, 10)]
    assert all(shorter < longer for shorter, longer in pairwise(errors))


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(4, 8), st.data())
def test_no_corrected_schedule_is_better_than_the_plan(seed: int, steps: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    velocities = torch.randn(steps, 9, dtype=torch.float64, generator=generator)
    bare = measured_profile(steps, 3, seed)
    table = replace(bare.branch().costs, velocities=velocities @ velocities.T)
    sigmas = tuple(1 - (i / steps) ** 1.3 for i in range(steps))
    profile = replace(bare, sigmas=sigmas, branches={"cond": BranchCurve((1.0,) * steps, costs=table)})
    costs = velocity_costs(table.velocities, [*sigmas, 0.0], 4)

    def error(marks: str) -> float:
        return math.sqrt(sum(float(costs[segment]) for segment in segments(marks)))

    budget = data.draw(st.integers(math.ceil(steps / 4), steps))
    found = plan(profile, budget=budget, reuse="corrected")
    best = min(error(marks) for marks in schedules(steps, budget, 3, 1))
    assert found.reuse == "corrected"
    assert found.predicted_error == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert error(found.schedule) == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert fill(profile, found.schedule, "corrected").predicted_error == pytest.approx(best, rel=1e-4, abs=1e-5)
