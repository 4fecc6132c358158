from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from magcache_core import fill, load_profile
from magcache_core.segment_costs import segment_costs
from tests.magcache_core.random_profiles import measured_profile


def test_measured_costs_are_squares_that_add_up() -> None:
    profile = measured_profile(8, 3, seed=1)
    costs = segment_costs(profile, profile.config(), "linear")
    measured = profile.branch().costs
    assert measured is not None
    assert costs.unit == "latent"
    assert costs.estimate(3, 2, 2) == pytest.approx(float(measured.segments["linear"][3, 2, 2]) ** 2)
    assert costs.error(9.0) == 3.0


def test_without_measured_costs_they_follow_from_the_ratios() -> None:
    """Step for step, how far the product of the ratios since the computed step has gone from one."""
    profile = load_profile("flux.1-dev")
    config = profile.config(28)
    costs = segment_costs(profile, config, "residual")
    for step, length in ((0, 1), (5, 3), (20, config.max_skip_steps)):
        products = [math.prod(config.ratios[step + 1 : step + 1 + n]) for n in range(1, length + 1)]
        expected = sum(abs(1 - product) for product in products)
        assert costs.estimate(step, 1, length) == pytest.approx(expected, rel=1e-5)
    assert costs.unit == "ratio"
    assert costs.error(0.25) == 0.25
    assert torch.isinf(costs.values[27, 1, 1]), "no step is left to reuse in"


def test_a_longer_run_than_measured_costs_more() -> None:
    profile = load_profile("flux-tiny")
    errors = [fill(profile, "CCC" + "." * n + "C" * (9 - n), "residual").predicted_error for n in range(1, 10)]
    assert all(shorter < longer for shorter, longer in pairwise(errors))
