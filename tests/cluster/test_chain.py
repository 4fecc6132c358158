"""Prompt and images in, a file out: the service's parts without a cluster against each model's whole pipeline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.engine.engine import Engine
from app.engine.families import FLUX_KONTEXT
from app.engine.source_fit import nearest_trained_size
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.settings import Settings
from benchmarks.make_checkpoint import make_checkpoint
from tests.engine.models import image, plans, run
from tests.local_group import job, psnr

PROMPT = "a green circle on a blue background"
TEXT_TOKENS = 32
IMAGES = [image(150, 100, seed=1), image(64, 90, seed=2)]


async def made_by_the_service(folder: Path, asked: DenoiseJob, sources: list[Image.Image]) -> np.ndarray:
    """Pixels in [0, 1], (height, width, 3), out of a PNG."""
    settings = Settings.model_validate({"model": str(folder), "sampling": {"max_sequence_length": TEXT_TOKENS}})
    encoder, decoder = PromptEncoder(settings), ImageDecoder(settings)
    prompt = await encoder.encode(PROMPT)
    encoded = [await decoder.encode(np.asarray(one), asked.width, asked.height, None) for one in sources]
    latents = run(Engine(folder), plans(asked), Conditioning(prompt, None, tuple(encoded)))
    file = await decoder.decode(latents, asked.width, asked.height, "png", 100)
    return np.asarray(Image.open(io.BytesIO(file))) / 255


def made_by_diffusers(folder: Path, asked: DenoiseJob, **options: Any) -> np.ndarray:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=PROMPT,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        **options,
    ).images[0]
    return np.asarray(made) / 255


@pytest.mark.parametrize(
    ("model", "sources"),
    [
        ("flux.1-dev", 0),
        ("flux.1-schnell", 0),
        ("flux.1-kontext-dev", 1),
        ("flux.2-klein-4b", 0),
        ("flux.2-klein-4b", 2),
    ],
)
async def test_the_service_paints_what_the_pipeline_paints(model: str, sources: int, tmp_path: Path) -> None:
    folder = make_checkpoint(model, "tiny", tmp_path / model)
    # What klein's pipeline calls guidance is true CFG, which a distilled model does not have.
    asked = job("a/0", size=(128, 96), steps=4, guidance_scale=1.0)
    ours = await made_by_the_service(folder, asked, IMAGES[:sources])
    options: dict[str, Any] = {}
    if model == "flux.1-kontext-dev":
        limit = Settings().sampling.max_pixels
        size = nearest_trained_size(FLUX_KONTEXT.trained_sizes, *IMAGES[0].size, limit)
        image = IMAGES[0].resize(size, Image.Resampling.LANCZOS)
        options = {"image": image, "max_area": asked.width * asked.height, "_auto_resize": False}
    elif sources:
        options = {"image": IMAGES[:sources]}
    assert psnr(ours, made_by_diffusers(folder, asked, **options)) >= 55
