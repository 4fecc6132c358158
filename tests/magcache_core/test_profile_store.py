"""Profiles: shipped ones, files, picking, resampling."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magcache_core import (
    BranchCurve,
    ConfigError,
    Profile,
    ProfileError,
    choose,
    load_profile,
    pick_profile,
    profile_names,
    schedule,
    write_profile,
)
from magcache_core import profile as profile_cli
from magcache_core.resample import interpolate, resample_over_sigma

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


def test_a_written_profile_is_read_back(tmp_path: Path) -> None:
    profile = replace(FLUX, name="mine", branches={"cond": FLUX.branches["cond"], "uncond": BranchCurve((1.1,) * 28)})
    path = tmp_path / "mine.json"
    write_profile(profile, path)
    assert load_profile(path) == profile
    assert load_profile(str(path)).branch("uncond").norm_ratios == (1.1,) * 28
    assert profile.branch("other") == profile.branch("cond")


def test_a_missing_profile_lists_the_shipped_ones() -> None:
    with pytest.raises(ProfileError, match=r"no profile 'flux.9'.*flux.1-dev"):
        load_profile("flux.9")


def damaged(**changes: object) -> str:
    document = json.loads(Path(profile_cli.__file__).with_name("profiles").joinpath("flux.1-dev.json").read_text())
    return json.dumps(document | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged: not JSON"),
        ("[]", "not a MagCache profile"),
        ('{"format": "other"}', "not a MagCache profile"),
        (damaged(version=2), "has version 2"),
        (damaged(branches={}), "no 'cond' branch"),
        (damaged(steps=27), r"27 steps|28 values"),
        (damaged(sigmas=[1.0]), "1 sigmas"),
        (damaged(protected_steps=[40]), "protected_steps"),
        (damaged(defaults={}), "threshold"),
        (
            damaged(branches={"cond": {"norm_ratios": [0.0] * 28, "norm_stds": [], "cos_dises": [], "costs": None}}),
            "norm_ratios",
        ),
        (
            damaged(
                branches={
                    "cond": {
                        "norm_ratios": [1.0] * 28,
                        "norm_stds": [],
                        "cos_dises": [],
                        "costs": {"max_skip": 3, "pairwise": {}, "segments": {}, "gram": [[1.0]]},
                    }
                }
            ),
            "gram",
        ),
    ],
)
def test_a_damaged_file_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as error:
        load_profile(path)
    assert "bad.json" in str(error.value)


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


def test_resampling_over_sigma() -> None:
    # |R| = exp(-sigma): between any two noise levels the ratio is exp(their difference).
    sigmas = [1 - i / 10 for i in range(10)]
    ratios = [1.0] + [math.exp(0.1)] * 9
    target = [1 - i / 37 for i in range(34)]
    found = resample_over_sigma(ratios, sigmas, target)
    assert found == pytest.approx([1.0] + [math.exp(1 / 37)] * 33)
    assert interpolate(sigmas, ratios, 2.0) == ratios[0]
    assert interpolate(sigmas, ratios, 0.0) == ratios[-1]


def test_config_over_sigma_keeps_the_protected_step() -> None:
    same = FLUX.config(28, resample="sigma", sigmas=FLUX.sigmas)
    assert same.ratios == pytest.approx(FLUX.ratios)
    assert schedule(same) == schedule(FLUX.config())
    finer = [1 - i / 56 for i in range(56)]
    assert any(
        abs(finer[i] - FLUX.sigmas[11]) < 0.03 for i in FLUX.config(56, resample="sigma", sigmas=finer).protected
    )
    assert FLUX.config(56).ratios == FLUX.config(56, resample="nearest").ratios
    with pytest.raises(ConfigError, match="sigmas"):
        FLUX.config(30, resample="sigma")
    with pytest.raises(ConfigError, match="nearest, sigma"):
        FLUX.config(30, resample="cubic")


def test_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "p.png"
    profile_cli.main(["show", "flux.1-dev", "--png", str(png)])
    printed = capsys.readouterr().out
    assert "CCC..C...C.C.....C.....C..C." in printed
    assert "computes 9 of 28" in printed
    assert png.read_bytes().startswith(b"\x89PNG")
    profile_cli.main(["list"])
    assert "flux.1-dev" in capsys.readouterr().out


def test_profile_defaults_are_checked() -> None:
    profile: Profile = replace(FLUX, threshold=-1.0)
    with pytest.raises(ConfigError, match="threshold"):
        profile.config()


@pytest.mark.parametrize("name", ["flux.1-dev", "flux-tiny"])
@pytest.mark.parametrize("first", [0, 3, 14, 27])
def test_a_tail_is_the_end_of_the_curve(name: str, first: int) -> None:
    whole = load_profile(name)
    tail = whole.tail(first, whole.steps)
    assert tail.steps == whole.steps - first
    assert tail.ratios == (1.0, *whole.ratios[first + 1 :])
    assert tail.sigmas == whole.sigmas[first:]
    found = choose(tail, tail.steps)
    assert len(found.schedule) == tail.steps
    assert math.isfinite(found.predicted_error)
    costs, known = tail.branch().costs, whole.branch().costs
    if costs is not None and known is not None and 0 < first < whole.steps - 3:
        assert costs.segments["fitted"][2, 2, 1] == known.segments["fitted"][first + 2, 2, 1]
        assert costs.segments["fitted"][0, 0, 1] == known.segments["residual"][first, 0, 1]
        assert torch.equal(costs.velocities, known.velocities[first:, first:])


def test_a_tail_of_another_step_count_begins_at_the_nearest_step() -> None:
    assert FLUX.tail(5, 10).ratios[1:] == FLUX.ratios[16:]  # step 5 of 9 is step 15 of 27
    assert FLUX.tail(5, 10).protected_steps == ()
    assert FLUX.tail(3, 10).protected_steps == (11 - 9,)
