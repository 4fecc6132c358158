"""Source images and what the VAE makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from app.components.source_encoder import SourceEncoder, latent_mask
from app.engine.families import FLUX_DEV
from app.engine.geometry import Geometry
from tests.local_group import MODEL, psnr


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


@pytest.mark.parametrize(("width", "height"), [(96, 64), (128, 96), (48, 80)])
def test_a_mask_is_scaled_and_picked_as_the_inpainting_pipeline_does(width: int, height: int) -> None:
    coarse = Image.fromarray(np.random.default_rng(5).integers(0, 256, (5, 7), dtype=np.uint8))
    mask = coarse.resize((97, 65), Image.Resampling.BICUBIC)
    processor = VaeImageProcessor(
        vae_scale_factor=16, vae_latent_channels=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    pixels = processor.preprocess(mask, height=height, width=width)
    expected = torch.nn.functional.interpolate(pixels, size=(height // 8, width // 8))[0, 0]
    ours = latent_mask(np.asarray(mask), width, height)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, expected == 1)
    assert 0.1 < ours.float().mean() < 0.9
