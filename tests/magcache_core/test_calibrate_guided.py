"""Calibration under true CFG: velocities are those that both branches make together."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline

from magcache_core.calibrate import calibrate
from magcache_core.profile_data import parse, to_json
from tests.magcache_core.prompt_pipe import STEPS, PromptPipe, job

SCALE = 3.0


def test_the_inner_products_are_of_the_guided_velocities(pipe: FluxPipeline) -> None:
    velocities: list[torch.Tensor] = []  # of both branches in turn, step by step
    forward = pipe.transformer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        velocities.append(output[0].double())
        return output

    pipe.transformer.forward = noted
    asked = {"num_inference_steps": STEPS, "width": 32, "height": 32, "guidance_scale": 3.5, "output_type": "latent"}
    expected = torch.zeros(STEPS, STEPS, dtype=torch.float64)
    for prompt in ("a", "b"):
        velocities.clear()
        noise = [torch.Generator().manual_seed(0)]
        PromptPipe(pipe)(prompt=[prompt], negative_prompt=["no"], true_cfg_scale=SCALE, generator=noise, **asked)
        for i in range(STEPS):
            for j in range(STEPS):
                a, b = (
                    uncond + SCALE * (cond - uncond)
                    for cond, uncond in (velocities[2 * step : 2 * step + 2] for step in (i, j))
                )
                expected[i, j] += (a * b).sum() / 2
    pipe.transformer.forward = forward
    profile = calibrate(PromptPipe(pipe), job(negative_prompt="no", true_cfg_scale=SCALE), "tiny", "t", progress=False)
    for branch in profile.branches.values():
        assert branch.costs is not None
        torch.testing.assert_close(branch.costs.velocities, expected, rtol=1e-5, atol=1e-5)
    assert profile.true_cfg_scale == SCALE
    assert parse(to_json(profile), "here").true_cfg_scale == SCALE


def test_without_a_negative_prompt_a_profile_is_of_no_true_cfg(pipe: FluxPipeline) -> None:
    profile = calibrate(PromptPipe(pipe), job(prompts=("a",)), "tiny", "t", progress=False)
    assert profile.true_cfg_scale is None
    assert parse(to_json(profile), "here").true_cfg_scale is None
