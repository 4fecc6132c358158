"""Shipped profiles, and which one is picked."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from magcache_core import (
    ProfileError,
    load_profile,
    pick_profile,
    profile_names,
)

FLUX = load_profile("flux.1-dev")


def test_shipped_profiles_load() -> None:
    assert {"flux.1-dev", "flux.1-kontext-dev", "flux.1-dev-vllm-omni"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert len(profile.ratios) == profile.steps == len(profile.sigmas)
        assert profile.provenance
        assert list(profile.sigmas) == sorted(profile.sigmas, reverse=True)


def test_flux_dev_has_the_authors_settings() -> None:
    assert (FLUX.threshold, FLUX.max_skip_steps, FLUX.retention_ratio) == (0.24, 5, 0.1)
    assert FLUX.protected_steps == (11,)
    kontext = load_profile("flux.1-kontext-dev")
    assert (kontext.threshold, kontext.max_skip_steps, kontext.retention_ratio) == (0.05, 4, 0.2)


def test_flux_dev_sigmas_are_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i * (1 - 1 / 28) / 27 for i in range(28)], mu=1.15)
    assert FLUX.sigmas == pytest.approx(scheduler.sigmas[:28].tolist(), abs=1e-5)


def test_a_missing_profile_lists_the_shipped_ones() -> None:
    with pytest.raises(ProfileError, match=r"no profile 'flux.9'.*flux.1-dev"):
        load_profile("flux.9")


def test_pick_is_by_model_then_steps_then_size_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="magcache_core")
    short = replace(FLUX, name="short", steps=8)
    small = replace(FLUX, name="small", width=512, height=512)
    candidates = [FLUX, short, small, load_profile("flux.1-kontext-dev")]
    assert pick_profile("black-forest-labs/FLUX.1-dev", 28, 1024, 1024, candidates).name == "flux.1-dev"
    assert pick_profile("/models/flux.1-dev/", 6, 1024, 1024, candidates).name == "short"
    assert pick_profile("FLUX.1-dev", 30, 640, 512, candidates).name == "small"
    assert pick_profile("FLUX.1-dev", 28, 1024, 1024).name == "flux.1-dev"
    assert "small (28 steps, 512x512) picked for FLUX.1-dev at 30 steps" in caplog.text
    with pytest.raises(ProfileError, match="no profile for model 'SDXL'"):
        pick_profile("SDXL", 28, 1024, 1024)
