"""Source images against what diffusers' pipelines make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from app.components.source_encoder import SourceEncoder, nearest_trained_size, within_area
from app.engine.families import FLUX_DEV, FLUX_KONTEXT
from app.engine.geometry import Geometry
from tests.local_group import MODEL, psnr

SIZES = [(1000, 1000), (300, 200), (200, 300), (1920, 1080), (64, 512), (4000, 100), (17, 16)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_kontext_takes_the_pipelines_size(width: int, height: int) -> None:
    shape = width / height
    _, *expected = min((abs(shape - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert sorted(FLUX_KONTEXT.trained_sizes) == sorted(PREFERRED_KONTEXT_RESOLUTIONS)
    assert nearest_trained_size(FLUX_KONTEXT.trained_sizes, width, height, 1024 * 1024) == tuple(expected)


def test_a_small_server_takes_the_same_shapes_smaller() -> None:
    width, height = nearest_trained_size(FLUX_KONTEXT.trained_sizes, 1920, 1080, 256 * 256)
    assert (width, height) == (1392 // 4 // 16 * 16, 752 // 4 // 16 * 16)


@pytest.mark.parametrize(("width", "height"), [(1500, 1100), (300, 200), (65, 513)])
def test_klein_takes_the_pipelines_pixels(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = Flux2ImageProcessor()
    limit = 512 * 512
    scaled = processor._resize_to_target_area(image, limit) if width * height > limit else image
    expected = processor.preprocess(
        scaled, height=scaled.height // 16 * 16, width=scaled.width // 16 * 16, resize_mode="crop"
    )
    ours = torch.from_numpy(np.array(within_area(image, limit))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ours[None], expected)


def test_a_source_survives_the_way_there_and_back() -> None:
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", dtype=torch.float32)
    pixels = np.full((96, 160, 3), (220, 40, 40), dtype=np.uint8)
    source = SourceEncoder(vae, FLUX_DEV).encode(pixels, 128, 64)
    assert (source.width, source.height) == (128, 64)
    assert source.latents.shape == (32, 64)
    latents = FLUX_DEV.layout.to_vae(vae, source.latents[None], Geometry.of(128, 64))
    with torch.inference_mode():
        back = vae.decode(latents, return_dict=False)[0][0].permute(1, 2, 0).clamp(-1, 1).numpy() / 2 + 0.5
    assert psnr(back, np.broadcast_to(pixels[0, 0] / 255, back.shape)) >= 24
