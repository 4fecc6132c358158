"""Source images and what the VAE makes of them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from app.components.source_encoder import SourceEncoder
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
