"""The plan for a request: what it names, and what the profile recommends where it names nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from magcache_core import ConfigError, choose, load_profile, plan, schedule
from tests.magcache_core.random_profiles import measured_profile

FLUX = load_profile("flux.1-dev")


@pytest.mark.parametrize("steps", range(4, 51))
def test_the_rule_has_a_finite_error_at_every_step_count(steps: int) -> None:
    """Few steps of a 28-step profile reuse over longer stretches than any measured; a reply must be a number."""
    made = choose(load_profile("flux-tiny"), steps, threshold=0.24, max_skip_steps=5, retention_ratio=0.1)
    assert math.isfinite(made.predicted_error)


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
