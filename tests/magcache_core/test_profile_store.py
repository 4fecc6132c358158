"""Shipped profiles, and which one is picked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from magcache_core import (
    ProfileError,
    load_profile,
    pick_profile,
    profile_names,
    save_profile,
    stored_profiles,
    was_measured_for,
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


def test_saved_profiles_are_found_and_damaged_ones_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "volume/profiles"
    assert stored_profiles(folder) == []
    tiny = load_profile("flux-tiny")
    for profile in (replace(FLUX, name="second"), replace(tiny, name="first")):
        assert save_profile(profile, folder).name == f"{profile.name}.json"
    (folder / "broken.json").write_text("{")
    found = stored_profiles(folder)
    assert [profile.name for profile in found] == ["first", "second"]
    assert found[0].version == replace(tiny, name="first").version != tiny.version
    assert "broken.json is damaged" in caplog.text
    save_profile(replace(FLUX, name="second", threshold=0.5), folder)
    assert [profile.threshold for profile in stored_profiles(folder)] == [tiny.threshold, 0.5]
    assert len(list(folder.iterdir())) == 3, "nothing but the profiles stays behind"


def test_what_a_profile_was_measured_for() -> None:
    measured = replace(FLUX, guidance_scale=3.5)
    at = ("black-forest-labs/FLUX.1-dev", FLUX.steps, FLUX.width, FLUX.height)
    assert was_measured_for(measured, *at, 3.5)
    assert was_measured_for(measured, "/models/flux.1-DEV/", FLUX.steps, FLUX.width * 5 // 4, FLUX.height)
    assert was_measured_for(replace(measured, guidance_scale=None), *at, 9.0)
    for other in (
        ("FLUX.1-schnell", *at[1:], 3.5),
        (at[0], FLUX.steps + 1, *at[2:], 3.5),
        (*at[:2], FLUX.width, FLUX.height // 2, 3.5),
        (*at, 5.0),
    ):
        assert not was_measured_for(measured, *other)


def test_the_nearest_guidance_is_picked_and_the_first_of_equals() -> None:
    low, high = (replace(FLUX, name=f"at-{scale:g}", guidance_scale=scale) for scale in (2.0, 5.0))
    at = (FLUX.model, FLUX.steps, FLUX.width, FLUX.height, [low, high])
    assert pick_profile(*at, 4.5) == high
    assert pick_profile(*at, 2.5) == low
    assert pick_profile(*at) == low
