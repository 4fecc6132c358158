"""What the picture benchmarks share: prompts, batched generation with flux-tiny, and how pictures are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from app.control.likeness import psnr, ssim
from models.recipe import checker, scenes, tokens
from models.recipe.scenes import Scene

SEED = 0
BATCH = 32


@dataclass(frozen=True)
class Prompts:
    """Captions with what they describe."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]


def draw_prompts(count: int, *, held_out: bool, seed: int) -> Prompts:
    """``count`` captions of scenes that the model was (or, held out, was not) trained on."""
    rng = np.random.default_rng([77, seed])
    drawn = [scenes.sample(rng, held_out=held_out) for _ in range(count)]
    return Prompts(tuple(scenes.caption(scene, rng) for scene in drawn), tuple(drawn))


class Generator:
    """flux-tiny in fp32 with its prompts embedded once; every call starts from the same noise."""

    def __init__(self, model: Path, prompts: Prompts, size: int = 128, guidance: float = 3.5) -> None:
        self.pipe: Any = FluxPipeline.from_pretrained(model, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = prompts
        self.size = size
        self.guidance = guidance
        with torch.inference_mode():
            self.embeds, self.pooled, _ = self.pipe.encode_prompt(
                prompt=list(prompts.texts), prompt_2=None, max_sequence_length=tokens.T5_LENGTH
            )

    @property
    def transformer(self) -> Any:
        """The transformer, to attach a cache to."""
        return self.pipe.transformer

    @torch.inference_mode()
    def __call__(self, steps: int) -> torch.Tensor:
        """Pictures in [0, 1], (prompts, 3, size, size)."""
        count = len(self.prompts.texts)
        return torch.cat([self._run(range(s, min(s + BATCH, count)), steps) for s in range(0, count, BATCH)])

    def _run(self, rows: range, steps: int) -> torch.Tensor:
        part = slice(rows.start, rows.stop)
        images: torch.Tensor = self.pipe(
            prompt_embeds=self.embeds[part],
            pooled_prompt_embeds=self.pooled[part],
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            width=self.size,
            height=self.size,
            generator=[torch.Generator().manual_seed(SEED + i) for i in rows],
            output_type="pt",
        ).images
        return images.clamp(0, 1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] -> an 8-bit picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def score(images: torch.Tensor, reference: torch.Tensor, truth: Sequence[Scene]) -> dict[str, float]:
    """Closeness to the uncached pictures (mean, and mean of the worst tenth) and what the pixel checker finds."""
    decibels, similarity = psnr(images, reference), ssim(images, reference)
    worst = max(1, len(decibels) // 10)
    verdicts = [checker.check(to_pil(image), scene) for image, scene in zip(images, truth, strict=True)]
    figures = {
        "psnr": decibels.mean().item(),
        "psnr_worst_decile": decibels.sort().values[:worst].mean().item(),
        "ssim": similarity.mean().item(),
        "ssim_worst_decile": similarity.sort().values[:worst].mean().item(),
        "checker_background": float(np.mean([v.background for v in verdicts])),
        "checker_colours": float(np.mean([ok for v in verdicts for ok in v.colours])),
        "checker_shapes": float(np.mean([ok for v in verdicts for ok in v.shapes])),
    }
    return {name: round(value, 4) for name, value in figures.items()}
