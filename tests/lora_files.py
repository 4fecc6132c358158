"""Adapters of flux-tiny that tests write."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from app.engine.lora_files import lora_digest

WIDTH = 192
_BLOCKS = 2


def write_lora(path: Path, fill: float = 0.01, rank: int = 2, width: int = WIDTH) -> str:
    """An adapter of the queries of flux-tiny's first blocks, of equal weights; returns its digest."""
    tensors = {}
    for block in range(_BLOCKS):
        linear = f"transformer.transformer_blocks.{block}.attn.to_q"
        tensors[f"{linear}.lora_A.weight"] = torch.full((rank, width), fill)
        tensors[f"{linear}.lora_B.weight"] = torch.full((width, rank), fill)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return lora_digest(path)


def weights_of(rank: int) -> int:
    """How many weights `write_lora` writes."""
    return _BLOCKS * 2 * rank * WIDTH
