"""Fitted weights, and inner products at another step count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magcache_core.fit import fitted_weights, least_squares, resample_gram


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
