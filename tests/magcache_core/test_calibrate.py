"""Calibration on a small pipeline, against numbers worked out by hand from the same runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from magcache_core import (
    MagCacheConfig,
    apply_mag_cache,
    choose,
    load_profile,
    schedule,
)
from magcache_core import calibrate as calibration
from magcache_core.calibrate import calibrate, packaged_prompts, read_prompts
from magcache_core.profile_data import Profile
from tests.magcache_core.prompt_pipe import STEPS, PromptPipe, job


def test_profile_and_provenance(measured: Profile) -> None:
    assert measured.transformer == "FluxTransformer2DModel"
    assert (measured.steps, measured.width, measured.height, measured.guidance_scale) == (STEPS, 32, 32, 3.5)
    assert measured.sigmas[0] == 1.0
    curve = measured.branch()
    assert len(curve.norm_ratios) == len(curve.norm_stds) == len(curve.cos_dises) == STEPS
    assert (curve.norm_ratios[0], curve.norm_stds[0], curve.cos_dises[0]) == (1.0, 0.0, 0.0)
    provenance = measured.provenance
    assert provenance["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert provenance["shift"]["use_dynamic_shifting"] is True
    assert provenance["dtype"] == "float32"
    assert provenance["runs"] == 2
    assert set(provenance["versions"]) == {"torch", "diffusers", "transformers", "python"}
    assert len(provenance["prompts_sha256"]) == 64


def test_batching_does_not_change_the_numbers(pipe: FluxPipeline, measured: Profile) -> None:
    one_by_one = calibrate(PromptPipe(pipe), job(), "tiny", "test/tiny", progress=False)
    assert one_by_one.ratios == pytest.approx(measured.ratios, abs=2e-5)
    a, b = one_by_one.branch().costs, measured.branch().costs
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.velocities, b.velocities, rtol=1e-4, atol=1e-4)
    for mode in ("residual", "linear"):  # fitted weights come from the runs so far, which batches cut differently
        torch.testing.assert_close(a.segments[mode], b.segments[mode], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.pairwise[mode], b.pairwise[mode], rtol=1e-3, atol=1e-5)


def test_cfg_branches_are_measured_apart(pipe: FluxPipeline) -> None:
    profile = calibrate(PromptPipe(pipe), job(negative_prompt="no", batch=2), "tiny", "t", progress=False)
    assert set(profile.branches) == {"cond", "uncond"}
    assert profile.branch("cond").norm_ratios != profile.branch("uncond").norm_ratios
    assert profile.config(branch="uncond").mag_ratios == profile.branch("uncond").norm_ratios


def test_ratios_equal_what_the_hooks_log(
    pipe: FluxPipeline, caplog: pytest.LogCaptureFixture, measured: Profile
) -> None:
    caplog.set_level("INFO", logger="magcache_core")
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    arguments = {"num_inference_steps": STEPS, "width": 32, "height": 32, "guidance_scale": 3.5}
    for prompt in ("a", "b"):
        PromptPipe(pipe)(
            prompt=[prompt], generator=[torch.Generator().manual_seed(0)], output_type="latent", **arguments
        )
    logged = [record.args[1] for record in caplog.records if record.args and record.args[0] == "norm_ratios"]  # type: ignore[index]
    mean = [sum(pair) / 2 for pair in zip(*logged, strict=True)]  # type: ignore[arg-type]
    assert measured.ratios == pytest.approx(mean, abs=2e-5)


def test_command_line(pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class Loader:
        @staticmethod
        def from_pretrained(model: str, dtype: torch.dtype) -> PromptPipe:
            assert (model, dtype) == ("some/model", torch.float32)
            return PromptPipe(pipe)

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Loader)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n two \n")
    out = tmp_path / "tiny.json"
    options = ["--steps", "4", "--size", "32x32", "--seeds", "2", "--batch", "3", "--device", "cpu", "--budget", "2"]
    calibration.main(["--model", "some/model", "--prompts", str(prompts), "--out", str(out), *options])
    profile = load_profile(out)
    assert (profile.name, profile.model, profile.steps) == ("tiny", "some/model", 4)
    assert profile.provenance["runs"] == 4
    assert json.loads(out.read_text())["version"] == 1
    assert schedule(profile.config()).startswith("C")
    assert (choose(profile).computed, profile.reuse) == (2, "corrected")
    refined = tmp_path / "refined.json"
    again = ["--refine", str(out), "--budgets", "2", "--trials", "3", "--seeds", "2", "--batch", "3", "--device", "cpu"]
    calibration.main(["--model", "some/model", "--prompts", str(prompts), "--out", str(refined), *again])
    found = load_profile(refined)
    assert found.provenance["refined"] == {"budgets": [2], "runs": 3, "moves": 6}
    assert replace(found, trials=(), provenance={}, branches={}) == replace(
        profile, trials=(), provenance={}, branches={}
    )
    assert [trial.computed for trial in found.trials] == [trial.computed for trial in profile.trials]


def test_a_third_of_the_prompts_and_at_most_four_are_held_out() -> None:
    assert [calibration.held_out_by_default(prompts) for prompts in (1, 2, 3, 8, 12, 16)] == [0, 0, 1, 2, 4, 4]
    asked = job(prompts=("a", "b", "c"), seeds=2, held_out=1)
    assert asked.runs == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert asked.judging_runs == [("c", 0), ("c", 1)]


def test_arguments_are_checked(pipe: FluxPipeline) -> None:
    with pytest.raises(SystemExit):
        calibration.main(["--model", "m", "--out", "o.json", "--size", "big"])
    with pytest.raises(SystemExit, match="--judge is 16; of 16 prompts one at least measures"):
        calibration.main(["--model", "m", "--out", "o.json", "--judge", "16"])
    with pytest.raises(ValueError, match="does not take max_sequence_length"):
        calibrate(PromptPipe(pipe), job(max_sequence_length=8), "tiny", "t", progress=False)
    with pytest.raises(ValueError, match="empty"):
        read_prompts("\n \n")
    assert len(packaged_prompts()) >= 8
