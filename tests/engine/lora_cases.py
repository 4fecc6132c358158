"""Adapters of flux-tiny made for tests, and diffusers' pipeline with them, which is the oracle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from app.messages.loras import LoraUse
from tests.local_group import MODEL, load_pipeline

RANK = 3
STRENGTH = 0.2
Pair = tuple[torch.Tensor, torch.Tensor]


def random_adapter(
    transformer: torch.nn.Module, seed: int, chosen: Callable[[str], bool] = lambda name: True
) -> dict[str, Pair]:
    """``down`` (RANK, inputs) and ``up`` (outputs, RANK) for each linear whose name is ``chosen``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    linears = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and chosen(name)
    }
    return {
        name: (drawn(RANK, one.in_features) * one.in_features**-0.5, drawn(one.out_features, RANK) * STRENGTH)
        for name, one in linears.items()
    }


def save_peft(path: Path, adapter: dict[str, Pair], alpha: float | None = None, **metadata: Any) -> Path:
    """Write ``adapter`` in diffusers' layout; ``metadata`` as diffusers writes PEFT's configuration."""
    tensors = {}
    for name, (down, up) in adapter.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.contiguous()
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    config = {f"transformer.{key}": value for key, value in metadata.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)} if config else None)
    return path


def flux_tiny() -> FluxTransformer2DModel:
    """The shipped model's transformer without its weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(MODEL / "transformer"))


def adapted_pipeline(folder: Path, names: Sequence[str]) -> Any:
    """Diffusers' pipeline with the adapters ``names`` of ``folder`` loaded and none of them active."""
    pipeline = load_pipeline()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        for name in names:
            pipeline.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    pipeline.disable_lora()
    return pipeline


def use(pipeline: Any, uses: Sequence[LoraUse]) -> None:
    """Make the adapters ``uses``, and no others, active in ``pipeline``."""
    if not uses:
        pipeline.disable_lora()
        return
    pipeline.enable_lora()
    pipeline.set_adapters([one.name for one in uses], [one.scale for one in uses])
