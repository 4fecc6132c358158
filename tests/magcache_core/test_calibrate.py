"""Calibration on a small pipeline, against numbers worked out by hand from the same runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from magcache_core import (
    MagCacheConfig,
    Plan,
    apply_mag_cache,
    choose,
    fill,
    load_profile,
    plan,
    remove_mag_cache,
    schedule,
)
from magcache_core import calibrate as calibration
from magcache_core.calibrate import CalibrationJob, calibrate, packaged_prompts, read_prompts
from magcache_core.profile_data import Profile, parse, to_json
from tests.magcache_core.conftest import POOLED_DIM, TEXT_DIM, TEXT_TOKENS

STEPS = 8


class PromptPipe:
    """The tiny pipeline with a prompt's hash in the place of text encoders."""

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe
        self.transformer, self.scheduler = pipe.transformer, pipe.scheduler

    def set_progress_bar_config(self, disable: bool) -> None:
        self.pipe.set_progress_bar_config(disable=disable)

    def to(self, device: str) -> PromptPipe:
        return self

    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int,
        width: int,
        height: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        output_type: str,
        negative_prompt: list[str] | None = None,
        true_cfg_scale: float = 1.0,
        callback_on_step_end: Any = None,
    ) -> Any:
        tokens, pooled = zip(*map(embeddings, prompt), strict=True)
        options: dict[str, Any] = {}
        if negative_prompt is not None:
            negative_tokens, negative_pooled = zip(*map(embeddings, negative_prompt), strict=True)
            options = {
                "negative_prompt_embeds": torch.stack(negative_tokens),
                "negative_pooled_prompt_embeds": torch.stack(negative_pooled),
                "true_cfg_scale": true_cfg_scale,
            }
        return self.pipe(
            prompt_embeds=torch.stack(tokens),
            pooled_prompt_embeds=torch.stack(pooled),
            num_inference_steps=num_inference_steps,
            width=width,
            height=height,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            **options,
        )


def embeddings(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(prompt.encode()))
    return torch.randn(TEXT_TOKENS, TEXT_DIM, generator=generator), torch.randn(POOLED_DIM, generator=generator)


def job(**changes: Any) -> CalibrationJob:
    settings: dict[str, Any] = {"prompts": ("a", "b"), "steps": STEPS, "width": 32, "height": 32}
    return CalibrationJob(**(settings | changes))


@pytest.fixture
def measured(pipe: FluxPipeline) -> Profile:
    return calibrate(PromptPipe(pipe), job(batch=2), "tiny", "test/tiny", progress=False)


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


def drift_of(pipe: FluxPipeline, followed: Plan) -> float:
    """How far the latents of a run with ``followed`` end from those of an uncached one, root mean square over runs."""

    def latents() -> torch.Tensor:
        return PromptPipe(pipe)(
            prompt=["a", "b"],
            num_inference_steps=STEPS,
            width=32,
            height=32,
            guidance_scale=3.5,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0) for _ in range(2)],
        ).images

    uncached = latents()
    apply_mag_cache(pipe.transformer, followed)
    drift = (latents() - uncached).square().sum(dim=(1, 2)).mean().sqrt()
    remove_mag_cache(pipe.transformer)
    return float(drift)


@pytest.mark.parametrize("reuse", ["residual", "linear"])
def test_a_segment_cost_is_the_latents_drift(pipe: FluxPipeline, measured: Profile, reuse: str) -> None:
    """A run whose only reuse is the last segment ends exactly as far away as the table says.

    With one reused step the measured cost has no approximation: the step starts from the uncached run's latents.
    """
    drift = drift_of(pipe, Plan("C" * (STEPS - 1) + ".", reuse))
    costs = measured.branch().costs
    assert costs is not None
    assert costs.segments[reuse][STEPS - 2, 1, 1] == pytest.approx(drift, rel=1e-3)
    assert costs.pairwise[reuse][STEPS - 2, 1, 1] == pytest.approx(drift, rel=1e-3)


def test_the_cost_of_a_predicted_end_is_its_drift(pipe: FluxPipeline, measured: Profile) -> None:
    """Nothing corrects the last segment, so its measured cost has no approximation either."""
    marks = "C" * (STEPS - 2) + ".."
    drift = drift_of(pipe, Plan(marks, "corrected"))
    assert fill(measured, marks, "corrected").predicted_error == pytest.approx(drift, rel=2e-3)


def test_sensitivity_is_the_growth_of_a_displacement(pipe: FluxPipeline, measured: Profile) -> None:
    """The drift at the end of a run that reuses one step is the table's drift there times the step's sensitivity."""
    drift = drift_of(pipe, Plan("CCCC.CCC"))
    costs = measured.branch().costs
    assert costs is not None
    assert costs.sensitivity[-1] == 1.0
    assert costs.segments["residual"][3, 1, 1] * costs.sensitivity[4] == pytest.approx(drift, rel=1e-3)
    assert costs.final("residual", STEPS, 3)[3, 1, 1] == pytest.approx(drift, rel=1e-3)


def test_segments_are_no_longer_than_their_steps_together(measured: Profile) -> None:
    """The norm of a sum is at most the sum of norms (each root mean square over the same runs)."""
    costs = measured.branch().costs
    assert costs is not None
    for mode, segments in costs.segments.items():
        pairwise = costs.pairwise[mode]
        finite = torch.isfinite(segments)
        together = torch.where(finite, pairwise, 0.0).cumsum(dim=2)
        assert bool((segments[finite] <= together[finite] * 1.001 + 1e-6).all())
        assert bool((segments[:, :, 0] == 0).all())


def test_costs_survive_the_file_and_plan_alike(measured: Profile) -> None:
    read = parse(to_json(measured), "tiny.json")
    before, after = measured.branch().costs, read.branch().costs
    assert before is not None
    assert after is not None
    for mode in before.segments:
        finite = torch.isfinite(before.segments[mode]) & torch.isfinite(after.segments[mode])
        torch.testing.assert_close(before.segments[mode][finite], after.segments[mode][finite], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(before.velocities, after.velocities, rtol=1e-9, atol=0.0)
    for reuse in ("residual", "linear", "fitted"):
        assert plan(read, budget=4, reuse=reuse).schedule == plan(measured, budget=4, reuse=reuse).schedule
        assert plan(read, budget=4, reuse=reuse).unit == "latent"


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


def test_arguments_are_checked(pipe: FluxPipeline) -> None:
    with pytest.raises(SystemExit):
        calibration.main(["--model", "m", "--out", "o.json", "--size", "big"])
    with pytest.raises(ValueError, match="does not take max_sequence_length"):
        calibrate(PromptPipe(pipe), job(max_sequence_length=8), "tiny", "t", progress=False)
    with pytest.raises(ValueError, match="empty"):
        read_prompts("\n \n")
    assert len(packaged_prompts()) >= 8
