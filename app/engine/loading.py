"""Load one rank's shard of a diffusers transformer straight from its safetensors files.

The model is built on the meta device and every parameter is read as the slice that this rank keeps, so peak memory
is the shard, not the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import diffusers
import torch
from diffusers.hooks.tensor_parallel import TPShardSpec
from torch import nn

from app.engine.checkpoint_files import CheckpointError, SafetensorsFile, read_json
from app.engine.fp8 import Quantization, quantize
from app.engine.parallel import (
    TensorParallelGroup,
    local_ranges,
    modulation_linears,
    parallelize,
    planned_linears,
    shard_specs,
)

SUPPORTED_TRANSFORMERS = ("FluxTransformer2DModel", "Flux2Transformer2DModel")
WEIGHTS = "diffusion_pytorch_model"
"""Prefix of diffusers' weight files."""
ENCODER_WEIGHTS = "model"
"""Prefix of transformers' weight files."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

TensorShape = tuple[int, ...]


def load_transformer(
    model: Path,
    group: TensorParallelGroup,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    modulation_on_host: bool = False,
) -> diffusers.ModelMixin:
    """Load ``model``'s transformer for this rank, in evaluation mode.

    Args:
        model: a folder in diffusers layout (``model_index.json``, ``transformer/``, ...).
        group: this rank's place; each rank reads only its slices.
        device: where the parameters go.
        dtype: floating-point type of all parameters but those that ``quantization`` stores.
        quantization: ``fp8`` for the weights that tensor parallelism splits, each as soon as it is read.
        modulation_on_host: leave the modulation's weights in (pinned) host memory.

    Raises:
        CheckpointError: a file is missing, damaged, of another class or shape, or holds too few or unknown tensors.
        ValueError: the group's size does not divide the attention heads, or this machine has no ``quantization``.
    """
    folder = model / "transformer"
    transformer = meta_transformer(folder)
    specs = shard_specs(transformer, group.size)
    small = {f"{name}.weight": linear for name, linear in planned_linears(transformer) if quantization == "fp8"}
    aside = [name for names in modulation_linears(transformer) for name in names] if modulation_on_host else []
    on_host = {f"{name}.{parameter}" for name in aside for parameter in ("weight", "bias")}
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in weight_files(folder)]
        check_tensors(folder, shapes(transformer), files)
        for name, tensor in _read_shard(files, specs, group):
            if name in on_host:
                _place(transformer, name, tensor.to(dtype).pin_memory() if device.type == "cuda" else tensor.to(dtype))
                continue
            _place(transformer, name, tensor.to(device=device, dtype=dtype))
            if name in small:
                quantize(small[name])
    parallelize(transformer, specs, group)
    return transformer.eval().requires_grad_(False)


def meta_transformer(folder: Path) -> diffusers.ModelMixin:
    """The transformer that ``folder``'s ``config.json`` describes, without memory for its parameters.

    Raises:
        CheckpointError: the file is missing, damaged or names a class that the engine can't run.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in SUPPORTED_TRANSFORMERS:
        supported = ", ".join(SUPPORTED_TRANSFORMERS)
        raise CheckpointError(
            f"{folder / 'config.json'} names the class {config.get('_class_name')!r}; supported are {supported}"
        )
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def weight_files(folder: Path, stem: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a component, from its index when it is sharded. Pickled weights are never read."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map: download it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
            hint = f" ({pickled[0]} is a pickle and is refused: convert it to safetensors)" if pickled else ""
            raise CheckpointError(f"{file} is missing{hint}")
    return files


def shapes(model: nn.Module) -> dict[str, TensorShape]:
    """The shape of every parameter, by name; tied parameters once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_tensors(folder: Path, expected: Mapping[str, TensorShape], files: list[SafetensorsFile]) -> None:
    """Compare the tensors of ``files`` in ``folder`` with ``expected``, from their headers alone.

    Raises:
        CheckpointError: a tensor is missing, unknown, duplicated or of another shape.
    """
    left = dict(expected)
    for file in files:
        for name, stored in file.tensors.items():
            if name not in expected:
                raise CheckpointError(
                    f"{file.path} holds the tensor {name!r}, which the {folder.name} of config.json does not have"
                )
            if name not in left:
                raise CheckpointError(f"{file.path} holds {name} once more: delete files that the index doesn't name")
            if stored.shape != left.pop(name):
                raise CheckpointError(
                    f"{file.path}: {name} has shape {stored.shape}, config.json asks for {expected[name]}"
                )
    if left:
        names = ", ".join(sorted(left)[:3])
        raise CheckpointError(f"{folder} lacks {len(left)} tensors of the {folder.name}, among them {names}")


def _read_shard(
    files: list[SafetensorsFile], specs: Mapping[str, TPShardSpec], group: TensorParallelGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        for name in file.tensors:
            spec = specs.get(name)
            ranges = local_ranges(spec, group.rank, group.size)
            yield name, file.read(name, spec.dim or 0 if spec else 0, ranges)


def _place(transformer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
