"""Fitted weights, plans of given schedules, and what a request follows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magcache_core import ConfigError, choose, decisions, fill, load_profile, plan, schedule
from magcache_core.fit import fitted_weights, least_squares, resample_gram
from tests.magcache_core.test_planner import measured_profile

FLUX = load_profile("flux.1-dev")


def path(steps: int, dim: int = 400, seed: int = 0) -> torch.Tensor:
    """Residuals on a smooth curve: a fixed part, a slope and a bend; (steps, dim)."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    return parts[0] + t * parts[1] + t**2 * parts[2]


def test_weights_find_what_the_residuals_lie_in() -> None:
    residuals = path(12)
    gram = residuals @ residuals.T
    for order, known in ((2, [7, 4, 1]), (1, [7, 4])):
        weights = least_squares(gram, 9, known, ridge=0.0)
        assert len(weights) == order + 1
        best = torch.linalg.lstsq(residuals[known].T, residuals[9]).solution
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), best)
    # Three points determine the curve.
    weights = least_squares(gram, 9, [7, 4, 1], ridge=0.0)
    found = sum(w * residuals[k] for w, k in zip(weights, [7, 4, 1], strict=True))
    torch.testing.assert_close(found, residuals[9])


def test_a_strong_ridge_is_plain_reuse() -> None:
    residuals = path(12)
    assert least_squares(residuals @ residuals.T, 9, [7, 4], ridge=1e9) == pytest.approx((1.0, 0.0), abs=1e-6)


@given(st.text("C.", min_size=0, max_size=20).map(lambda marks: "C" + marks))
def test_weights_follow_the_schedule(marks: str) -> None:
    residuals = path(len(marks))
    weights = fitted_weights(residuals @ residuals.T, marks, order=2)
    computed = 0
    for mark, factors in zip(marks, weights, strict=True):
        computed += mark == "C"
        assert len(factors) == (0 if mark == "C" else min(computed, 3))


def test_inner_products_at_another_step_count() -> None:
    straight = torch.linspace(0, 1, 15, dtype=torch.float64)[:, None] * path(1)[0] + path(1, seed=5)[0]
    gram = straight @ straight.T
    finer = resample_gram(gram, 29)
    torch.testing.assert_close(finer[::2, ::2], gram)
    middle = (straight[3] + straight[4]) / 2
    torch.testing.assert_close(finer[7, 7], middle @ middle)
    assert resample_gram(gram, 15) is gram


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


def test_a_request_that_says_nothing_gets_the_recommendation() -> None:
    assert choose(FLUX).schedule == schedule(FLUX.config())
    assert choose(FLUX, 50).schedule == schedule(FLUX.config(50))
    measured = replace(measured_profile(8, 3, seed=1), budget=5, reuse="linear")
    assert choose(measured) == plan(measured, budget=5)
    longer = choose(measured, 16)
    assert longer.predicted_error <= plan(measured, budget=5).predicted_error


def test_a_request_gets_what_it_names() -> None:
    assert choose(FLUX, threshold=0.0, max_skip_steps=1).schedule == schedule(
        FLUX.config(threshold=0.0, max_skip_steps=1)
    )
    assert choose(FLUX, 28, budget=9, reuse="scaled") == plan(FLUX, 28, budget=9, reuse="scaled")
    assert choose(FLUX, 28, max_error=0.3) == plan(FLUX, 28, max_error=0.3)
    measured = replace(measured_profile(8, 3, seed=1), budget=5)
    assert choose(measured, threshold=0.5).schedule == schedule(measured.config(threshold=0.5))
    assert "..." not in choose(measured, max_skip_steps=2).schedule
    with pytest.raises(ConfigError, match="threshold"):
        choose(FLUX, threshold=0.1, budget=9)


def test_importing_the_library_needs_torch_only() -> None:
    code = (
        "import sys, magcache_core; "
        "bad = {'diffusers', 'transformers', 'ray', 'fastapi', 'PIL', 'matplotlib'}; "
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
