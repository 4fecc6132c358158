"""Load one rank's shard of a diffusers transformer straight from its safetensors files.

The model is built on the meta device and every parameter is read as the slice that this rank keeps, so the peak memory
is the shard, not the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks.tensor_parallel import TPShardSpec
from safetensors import SafetensorError, safe_open
from torch import nn

from app.engine.parallel import TensorParallelGroup, local_slices, parallelize, shard_specs

SUPPORTED_TRANSFORMERS = ("FluxTransformer2DModel", "Flux2Transformer2DModel")
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
SINGLE_FILE = "diffusion_pytorch_model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be served; the message names the file or number and what to do."""


def load_transformer(
    model: Path, group: TensorParallelGroup, device: torch.device, dtype: torch.dtype
) -> diffusers.ModelMixin:
    """Load ``model``'s transformer for this rank, in evaluation mode.

    Args:
        model: a folder in diffusers layout (``model_index.json``, ``transformer/``, ...).
        group: this rank's place; each rank reads only its slices.
        device: where the parameters go.
        dtype: floating-point type of all parameters.

    Raises:
        CheckpointError: a file is missing, damaged, of another class or shape, or holds too few or unknown tensors.
        ValueError: the group's size does not divide the attention heads.
    """
    folder = model / "transformer"
    config = read_config(folder)
    with torch.device("meta"):
        transformer = getattr(diffusers, config["_class_name"]).from_config(config)
    specs = shard_specs(transformer, group.size)
    expected = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    for file in weight_files(folder):
        for name, tensor in _read_shard(file, expected, specs, group):
            del expected[name]
            _place(transformer, name, tensor.to(device=device, dtype=dtype))
    if expected:
        names = ", ".join(sorted(expected)[:3])
        raise CheckpointError(f"{folder} lacks {len(expected)} tensors of the transformer, among them {names}")
    parallelize(transformer, specs, group)
    return transformer.eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a transformer's ``config.json`` and check that its class is one that the engine can run."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: is this a model folder in diffusers layout?")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if config.get("_class_name") not in SUPPORTED_TRANSFORMERS:
        supported = ", ".join(SUPPORTED_TRANSFORMERS)
        raise CheckpointError(f"{path} names the class {config.get('_class_name')!r}; supported are {supported}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, from its index when it is sharded. Pickled weights are never read."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            hint = f" ({pickled[0]} is a pickle and is refused: convert it to safetensors)" if pickled else ""
            raise CheckpointError(f"{file} is missing{hint}")
    return files


def _read_shard(
    file: Path, expected: dict[str, tuple[int, ...]], specs: dict[str, TPShardSpec], group: TensorParallelGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name not in expected:
                    raise CheckpointError(f"{file} holds the tensor {name!r}, which the transformer does not have")
                whole = tensors.get_slice(name)
                if tuple(whole.get_shape()) != expected[name]:
                    raise CheckpointError(
                        f"{file}: {name} has shape {tuple(whole.get_shape())}, config.json asks for {expected[name]}"
                    )
                spec = specs.get(name)
                parts = [whole[index or ...] for index in local_slices(spec, group.rank, group.size)]
                yield name, parts[0] if len(parts) == 1 else torch.cat(parts, dim=spec.dim if spec else 0)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): download it again") from error


def _place(transformer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(owner), leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))
