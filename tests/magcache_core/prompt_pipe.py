"""A small pipeline that takes prompts, and how it is calibrated."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline

from magcache_core.calibrate import CalibrationJob
from tests.magcache_core.tiny_flux import POOLED_DIM, TEXT_DIM, TEXT_TOKENS

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
