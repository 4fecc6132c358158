"""A curve at other noise levels, and at other step counts."""

from __future__ import annotations

import math

import pytest

from magcache_core.resample import interpolate, nearest_index, positions, resample_over_sigma


def test_resampling_over_sigma() -> None:
    # |R| = exp(-sigma): between any two noise levels the ratio is exp(their difference).
    sigmas = [1 - i / 10 for i in range(10)]
    ratios = [1.0] + [math.exp(0.1)] * 9
    target = [1 - i / 37 for i in range(34)]
    found = resample_over_sigma(ratios, sigmas, target)
    assert found == pytest.approx([1.0] + [math.exp(1 / 37)] * 33)
    assert interpolate(sigmas, ratios, 2.0) == ratios[0]
    assert interpolate(sigmas, ratios, 0.0) == ratios[-1]


def test_steps_take_the_nearest_entry_with_halves_to_even() -> None:
    assert [nearest_index(step, 5, 3) for step in range(5)] == [0, 0, 1, 2, 2]  # 0.5 goes to 0, 1.5 to 2
    assert positions(5, 3) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert (nearest_index(0, 1, 28), positions(1, 28)) == (27, [27.0])
