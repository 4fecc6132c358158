"""A profile as JSON and back, its settings for a request, and the end of its curve."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magcache_core import BranchCurve, ConfigError, Profile, ProfileError, choose, load_profile, schedule, write_profile
from magcache_core import profile as profile_cli

FLUX = load_profile("flux.1-dev")


def test_a_written_profile_is_read_back(tmp_path: Path) -> None:
    profile = replace(FLUX, name="mine", branches={"cond": FLUX.branches["cond"], "uncond": BranchCurve((1.1,) * 28)})
    path = tmp_path / "mine.json"
    write_profile(profile, path)
    assert load_profile(path) == profile
    assert load_profile(str(path)).branch("uncond").norm_ratios == (1.1,) * 28
    assert profile.branch("other") == profile.branch("cond")


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
