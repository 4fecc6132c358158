"""Load one rank's shard of a diffusers transformer straight from its safetensors files.

The model is built on the meta device and every parameter is read as the slice that this rank keeps, so peak memory
is the shard, not the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import diffusers
import torch
from diffusers.hooks.tensor_parallel import TPShardSpec
from torch import nn

from app.engine.checkpoint_files import CheckpointError, SafetensorsFile, read_json
from app.engine.finite import check_finite
from app.engine.fp8 import Quantization, quantize
from app.engine.fused import Slot, fuse
from app.engine.parallel import (
    TensorParallelGroup,
    local_ranges,
    modulation_linears,
    parallelize,
    planned_linears,
    shard_specs,
)
from app.engine.single_file import diffusers_tensors
from app.engine.weight_files import weight_files

SUPPORTED_TRANSFORMERS = ("FluxTransformer2DModel", "Flux2Transformer2DModel")

TensorShape = tuple[int, ...]


def load_transformer(
    model: Path,
    group: TensorParallelGroup,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    modulation_on_host: bool = False,
    single_file: Path | None = None,
) -> diffusers.ModelMixin:
    """Load ``model``'s transformer for this rank, in evaluation mode.

    Args:
        model: a folder in diffusers layout (``model_index.json``, ``transformer/``, ...).
        group: this rank's place; each rank reads only its slices.
        device: where the parameters go.
        dtype: floating-point type of all parameters but those that ``quantization`` stores.
        quantization: ``fp8`` for the weights that tensor parallelism splits, each as soon as it is read.
        modulation_on_host: leave the modulation's weights in (pinned) host memory.
        single_file: the weights, in BFL's layout, instead of those of ``model``.

    Raises:
        CheckpointError: a file is missing, damaged, of another class or shape, or holds too few or unknown tensors,
            or values that are not finite.
        ValueError: the group's size does not divide the attention heads, or this machine has no ``quantization``.
    """
    folder = model / "transformer"
    transformer = meta_transformer(folder)
    specs = shard_specs(transformer, group.size)
    with ExitStack() as stack:
        files = open_transformer(stack, folder, transformer, single_file)
        check_tensors(folder, shapes(transformer), files)
        parallelize(transformer, specs, group)
        shard = _Shard(transformer, fuse(transformer), dtype)
        small = {f"{name}.weight": linear for name, linear in planned_linears(transformer) if quantization == "fp8"}
        aside = [name for names in modulation_linears(transformer) for name in names] if modulation_on_host else []
        on_host = {f"{name}.{parameter}" for name in aside for parameter in ("weight", "bias")}
        for name, stored in _read_shard(files, specs, group):
            stays = name in on_host
            tensor = stored.to(dtype) if stays else stored.to(device=device, dtype=dtype)
            check_finite(single_file or folder, [(name, tensor)])
            complete = shard.place(name, tensor.pin_memory() if stays and device.type == "cuda" else tensor)
            if complete in small:
                quantize(small[complete])
    return transformer.eval().requires_grad_(False)


class _Shard:
    """A transformer on the meta device that gets its parameters one by one, fused ones part by part."""

    def __init__(self, transformer: nn.Module, slots: Mapping[str, Slot], dtype: torch.dtype) -> None:
        self._transformer = transformer
        self._slots = slots
        self._dtype = dtype
        self._missing = Counter(slot.parameter for slot in slots.values())

    def place(self, name: str, tensor: torch.Tensor) -> str | None:
        """Take this rank's part of the checkpoint's ``name``; the name of the parameter that is whole by it, if any."""
        slot = self._slots.get(name)
        if slot is None:
            self._set(name, tensor)
            return name
        target = self._transformer.get_parameter(slot.parameter)
        if target.is_meta:
            target = self._set(slot.parameter, torch.empty(target.shape, dtype=self._dtype, device=tensor.device))
        target[slot.begin : slot.end].copy_(tensor)
        self._missing[slot.parameter] -= 1
        return None if self._missing[slot.parameter] else slot.parameter

    def _set(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(self._transformer.get_submodule(owner), leaf, parameter)
        return parameter


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


def open_transformer(
    stack: ExitStack, folder: Path, transformer: diffusers.ModelMixin, single_file: Path | None
) -> list[SafetensorsFile]:
    """The weights of ``transformer`` as files, open until ``stack`` closes: ``single_file``, or those of ``folder``.

    Raises:
        CheckpointError: a file is missing or cannot be read, or ``single_file`` is none of this transformer.
    """
    if single_file is None:
        return [stack.enter_context(SafetensorsFile(path)) for path in weight_files(folder)]
    file = stack.enter_context(SafetensorsFile(single_file))
    file.refuse_quantized()
    file.tensors = diffusers_tensors(single_file, file.tensors, transformer)
    return [file]


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
        file.refuse_quantized()
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
