"""flux-tiny's files around a random transformer of about 160 million parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

BLOCKS = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 12, "attention_head_dim": 64}
ROPE_AXES = [16, 24, 24]


def write_checkpoint(base: Path, out: Path, **shape: int) -> int:
    """Write the checkpoint into ``out``; everything but the transformer is that of ``base``.

    Args:
        shape: other values for `BLOCKS`, for example of a quick run.

    Returns:
        The number of the transformer's parameters.
    """
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("transformer"))
    config = FluxTransformer2DModel.load_config(base / "transformer")
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_config(config | BLOCKS | {"axes_dims_rope": ROPE_AXES} | shape)
    model.save_pretrained(out / "transformer")
    return sum(parameter.numel() for parameter in model.parameters())
