"""The planner against brute force, and its guarantees."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magcache_core import BranchCurve, ConfigError, Profile, decisions, fewest_steps, fill, load_profile, plan, schedule
from magcache_core.planner import segments
from magcache_core.velocity_costs import velocity_costs
from tests.magcache_core.random_profiles import measured_profile

FLUX = load_profile("flux.1-dev")


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


def test_fill_follows_any_schedule() -> None:
    marks = schedule(FLUX.config())
    made = fill(FLUX, marks, "residual")
    assert (made.schedule, made.unit, made.weights) == (marks, "ratio", ())
    assert [d.compute for d in decisions(made)] == [mark == "C" for mark in marks]
    with pytest.raises(ConfigError, match="ratios only"):
        fill(FLUX, marks, "fitted")
    profile = measured_profile(8, 3, seed=1)
    best = plan(profile, budget=4, reuse="linear")
    again = fill(profile, best.schedule, "linear")
    assert again.predicted_error == pytest.approx(best.predicted_error)
    fitted = fill(profile, "CC..C...", "fitted")
    assert [len(w) for w in fitted.weights] == [0, 0, 2, 2, 0, 3, 3, 3]
    assert [d.weights for d in decisions(fitted)] == list(fitted.weights)
    with pytest.raises(ConfigError, match="schedule"):
        fill(FLUX, ".C", "residual")
