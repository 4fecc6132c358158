"""Tokens of an image, as FLUX packs its latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from app.engine.geometry import Geometry


@pytest.mark.parametrize(("width", "height"), [(160, 96), (64, 256), (16, 16)])
def test_a_token_stands_for_sixteen_by_sixteen_pixels(width: int, height: int) -> None:
    latents = torch.zeros(1, 16, height // 8, width // 8)
    packed = FluxPipeline._pack_latents(latents, 1, 16, height // 8, width // 8)
    geometry = Geometry.of(width, height)
    assert geometry.tokens == packed.shape[1]
    assert (geometry.rows, geometry.columns) == (height // 16, width // 16)
