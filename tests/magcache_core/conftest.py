"""Small, randomly initialised models: the code paths are those of the real ones, the numbers don't matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from magcache_core.calibrate import calibrate
from magcache_core.profile_data import Profile
from tests.magcache_core.hooked import Recorder
from tests.magcache_core.prompt_pipe import PromptPipe, job
from tests.magcache_core.tiny_flux import POOLED_DIM, TEXT_DIM, TEXT_TOKENS, make_flux


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    return make_flux()


@pytest.fixture
def pipe(flux: FluxTransformer2DModel) -> FluxPipeline:
    """FluxPipeline without text encoders, images of 32 x 32 pixels (16 image tokens)."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, flux)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def generate(pipe: FluxPipeline) -> Callable[..., torch.Tensor]:
    """Call the pipeline: ``generate(steps, true_cfg_scale=...)`` -> packed latents."""
    generator = torch.Generator().manual_seed(7)
    embeds = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
    }
    negative = {
        "negative_prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
    }

    def call(steps: int, true_cfg_scale: float = 1.0, **options: Any) -> torch.Tensor:
        return pipe(
            **embeds,
            **(negative if true_cfg_scale > 1 else {}),
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=steps,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            **options,
        ).images

    return call


@pytest.fixture
def measured(pipe: FluxPipeline) -> Profile:
    return calibrate(PromptPipe(pipe), job(batch=2), "tiny", "test/tiny", progress=False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)
