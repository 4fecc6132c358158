"""Weights that are not finite are refused by name, in every part of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.components.prompt_encoder import TextEncoders
from app.components.vae import ImageDecoder
from app.engine.checkpoint_files import CheckpointError
from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from app.settings import Settings
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny

CPU = torch.device("cpu")
LOADED: dict[str, Callable[[Path], object]] = {
    "transformer": lambda model: load_transformer(model, TensorParallelGroup(), CPU, torch.float32),
    "vae": lambda model: ImageDecoder(Settings(model=str(model))),
    "text_encoder_2": lambda model: TextEncoders(model, 32, torch.float32, CPU, offload=False),
}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (f"transformer/{WEIGHTS}", "transformer_blocks.0.attn.to_q.weight"),
        (f"vae/{WEIGHTS}", "encoder.conv_in.weight"),
        ("text_encoder_2/model.safetensors", "shared.weight"),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, file: str, name: str, value: float) -> None:
    model = copy_of_flux_tiny(tmp_path / "model")
    tensors = load_file(model / file)
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / file, {"format": "pt"})
    part = file.partition("/")[0]
    with pytest.raises(CheckpointError, match=f"{part}: {name} holds values that are not finite: .*download"):
        LOADED[part](model)


def test_a_dtype_that_is_too_small_for_the_weights_is_named(tmp_path: Path) -> None:
    model = copy_of_flux_tiny(tmp_path / "model")
    tensors = load_file(model / "transformer" / WEIGHTS)
    tensors["x_embedder.weight"][0, 0] = 1e5
    save_file(tensors, model / "transformer" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight .* dtype float16 is too small for it"):
        load_transformer(model, TensorParallelGroup(), CPU, torch.float16)
    load_transformer(model, TensorParallelGroup(), CPU, torch.bfloat16)
