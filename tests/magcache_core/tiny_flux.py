"""A FLUX.1 transformer as small as its code allows; the numbers don't matter."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 5, 24, 20


def make_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """A FLUX.1 transformer with 1 double and 2 single blocks, 2 heads of 16, 16 channels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**(settings | changes)).eval()
