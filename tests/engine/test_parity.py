"""Diffusers is the oracle: its pipeline with the cache off, its MagCache hooks with the cache on."""

from __future__ import annotations

import pytest
from diffusers import FluxPipeline, MagCacheConfig

from app.control.schedule import BranchSchedule, SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.engine import Engine
from app.engine.sampling import FlowMatchSampler
from app.messages.conditioning import Conditioning
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import REUSE_MODES, apply_mag_cache, decisions, fill, load_profile, remove_mag_cache
from tests.local_group import MODEL, decode, embed, execute, job, plans, psnr, reference

PROMPT = "a red circle on a blue background"
NEGATIVE = "a green square on a yellow background"


@pytest.mark.parametrize(
    "asked",
    [
        job("a/0"),
        job("a/1", size=(160, 96), steps=9, seed=3, guidance_scale=2.0),
        job("a/2", size=(96, 160), steps=20, seed=2**40),
    ],
    ids=["default", "landscape", "portrait"],
)
def test_cache_off_equals_flux_pipeline(engine: Engine, pipeline: FluxPipeline, asked) -> None:
    latents = execute(engine, plans([asked]), {asked.row_id: Conditioning(embed(pipeline, PROMPT))})
    ours = decode(pipeline, latents[asked.row_id], asked)
    theirs = decode(pipeline, reference(pipeline, PROMPT, asked), asked)
    assert psnr(ours, theirs) >= 60


def test_true_cfg_equals_flux_pipeline(engine: Engine, pipeline: FluxPipeline) -> None:
    asked = job("a/0", true_cfg_scale=2.5)
    conditioning = Conditioning(embed(pipeline, PROMPT), embed(pipeline, NEGATIVE))
    latents = execute(engine, plans([asked]), {"a/0": conditioning})
    expected = decode(pipeline, reference(pipeline, PROMPT, asked, negative_prompt=NEGATIVE), asked)
    assert psnr(decode(pipeline, latents["a/0"], asked), expected) >= 60
    without = decode(pipeline, reference(pipeline, PROMPT, asked), asked)
    assert psnr(expected, without) < 50, "true CFG must change the image, or this test shows nothing"


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cache_on_equals_diffusers_hooks(engine: Engine, pipeline: FluxPipeline, scale: float) -> None:
    """The same curve and settings; vLLM-Omni's curve has no protected step, which diffusers does not know."""
    profile = load_profile("flux.1-dev-vllm-omni")
    options = MagCacheOptions(True, mag_threshold=0.24, mag_max_skip_steps=5, mag_retention_ratio=0.1)
    asked = job("a/0", true_cfg_scale=scale, magcache=options)
    conditioning = Conditioning(embed(pipeline, PROMPT), embed(pipeline, NEGATIVE) if scale > 1 else None)
    latents = execute(engine, plans([asked], profile.name), {"a/0": conditioning})

    computed_at: list[int] = []
    last_block = pipeline.transformer.single_transformer_blocks[0].attn  # inside of what the hooks skip
    spy = last_block.register_forward_pre_hook(lambda *_: computed_at.append(pipeline.scheduler.step_index or 0))
    pipeline.transformer.enable_cache(
        MagCacheConfig(
            threshold=0.24,
            max_skip_steps=5,
            retention_ratio=0.1,
            num_inference_steps=28,
            mag_ratios=list(profile.ratios),
        )
    )
    try:
        negative = {"negative_prompt": NEGATIVE} if scale > 1 else {}
        expected = reference(pipeline, PROMPT, asked, **negative)
    finally:
        pipeline.transformer.disable_cache()
        spy.remove()

    settings = Settings(magcache=MagCacheSettings(profile=profile.name))
    schedule = SchedulePlanner(settings, FlowMatchSampler(MODEL)).schedules(asked)["cond"]
    theirs = "".join("C" if step in computed_at else "." for step in range(28))
    assert theirs == schedule.text
    assert theirs.count(".") > 14
    assert psnr(decode(pipeline, latents["a/0"], asked), decode(pipeline, expected, asked)) >= 60


@pytest.mark.parametrize("reuse", REUSE_MODES)
def test_every_reuse_mode_equals_the_hooks(engine: Engine, pipeline: FluxPipeline, reuse: str) -> None:
    plan = fill(load_profile("flux-tiny"), "CCC..C...C..C...C.C..C...C.C", reuse)
    asked = job("a/0")
    decided = decisions(plan, engine.sampler.sigmas(28, 64).tolist())
    residuals_kept = max(len(decision.weights) for decision in decided)
    assert residuals_kept == {"residual": 1, "scaled": 1, "linear": 2, "fitted": 3}.get(reuse, 0)
    scheduler = StepScheduler(Settings())
    scheduler.submit(asked, {"cond": BranchSchedule(decided, residuals_kept, 0.0)})
    formed = list(iter(scheduler.next_plan, None))
    latents = execute(engine, formed, {"a/0": Conditioning(embed(pipeline, PROMPT))})

    apply_mag_cache(pipeline.transformer, plan)
    try:
        expected = reference(pipeline, PROMPT, asked)
    finally:
        remove_mag_cache(pipeline.transformer)
    assert psnr(decode(pipeline, latents["a/0"], asked), decode(pipeline, expected, asked)) >= 60
