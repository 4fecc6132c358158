"""The plan for requests that are guided otherwise than the runs of the profile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from magcache_core import Profile, choose, load_profile, plan, schedule

TINY = load_profile("flux-tiny")
FLUX = load_profile("flux.1-dev")


def guided(scale: float, reuse: str = "corrected", budget: int = 12) -> Profile:
    """flux-tiny's profile as if it had been measured with true CFG."""
    return replace(TINY, true_cfg_scale=scale, reuse=reuse, budget=budget, trials=())


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_true_cfg_that_was_not_measured_reuses_residuals_and_computes_the_first_steps(branch: str) -> None:
    made = choose(TINY, branch=branch, true_cfg_scale=4.0)
    assert (made.reuse, made.computed) == ("residual", 12)  # a fifth above the recommended 10
    assert made.schedule.startswith("C" * 6 + ".")  # a fifth of 28
    assert made.reason == "profile flux-tiny was measured without true CFG"
    assert choose(TINY, true_cfg_scale=1.0) == choose(TINY)
    assert choose(TINY).reason == ""


def test_what_a_request_names_under_true_cfg_is_kept() -> None:
    assert choose(TINY, budget=16, true_cfg_scale=4.0).computed == 16
    few = choose(TINY, budget=4, true_cfg_scale=4.0)  # too few for the first fifth and the rest
    assert (few.computed, few.reuse) == (4, "residual")
    assert choose(TINY, budget=12, retention_ratio=0.0, true_cfg_scale=4.0).schedule.startswith("C.")
    assert choose(TINY, reuse="corrected", true_cfg_scale=4.0).reuse == "corrected"
    rule = choose(TINY, threshold=0.24, true_cfg_scale=4.0)
    assert (rule.schedule, rule.reuse) == (schedule(TINY.config(28)), "residual")


@pytest.mark.parametrize("steps", range(4, 51))
@pytest.mark.parametrize("profile", [TINY, guided(4.0)], ids=["unmeasured", "measured"])
def test_every_step_count_has_a_plan_under_true_cfg(profile: Profile, steps: int) -> None:
    made = choose(profile, steps, guidance_scale=9.0, true_cfg_scale=7.0)
    assert len(made.schedule) == steps
    assert math.isfinite(made.predicted_error)


def test_a_profile_that_was_measured_with_true_cfg_is_followed() -> None:
    for reuse in ("corrected", "residual"):
        profile = guided(2.0, reuse)
        assert choose(profile, true_cfg_scale=2.0) == plan(profile, budget=12)
        assert choose(profile, true_cfg_scale=2.0).reuse == reuse


def test_without_measured_costs_true_cfg_changes_nothing() -> None:
    assert choose(FLUX, true_cfg_scale=4.0) == choose(FLUX)


@pytest.mark.parametrize(
    ("profile", "guidance", "scale", "computed"),
    [
        (TINY, None, 1.0, 10),
        (TINY, 1.0, 1.0, 10),
        (TINY, 5.0, 1.0, 10),
        (TINY, 7.0, 1.0, 20),
        (TINY, 7.0, 4.0, 24),
        (replace(TINY, guidance_scale=None), 7.0, 1.0, 10),
        (guided(4.0), 3.5, 2.0, 12),
        (guided(4.0), 3.5, 6.0, 12),
        (guided(4.0), 3.5, 7.0, 18),
        (replace(guided(4.0), budget=24), 3.5, 7.0, 28),
    ],
)
def test_far_beyond_the_measured_guidance_more_steps_compute(
    profile: Profile, guidance: float | None, scale: float, computed: int
) -> None:
    made = choose(profile, guidance_scale=guidance, true_cfg_scale=scale)
    assert made.computed == computed
    assert ("far beyond" in made.reason) == (computed not in (10, 12))


def test_under_true_cfg_trials_recommend_nothing_at_other_step_counts() -> None:
    """Evenly spaced steps miss the first ones, which change most."""
    measured = replace(guided(2.0), trials=TINY.trials)
    assert plan(measured, 50, budget=13) == plan(replace(measured, trials=()), 50, budget=13)
    assert plan(TINY, 50, budget=13) != plan(replace(TINY, trials=()), 50, budget=13)
