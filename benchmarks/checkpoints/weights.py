"""Random weights of a part, streamed into safetensors files one tensor at a time, whatever the part's size."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from benchmarks.checkpoints.geometry import Part

DTYPE = torch.bfloat16
_NAMES = {torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its published name, shape and dtype, and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def build(part: Part) -> nn.Module:
    """The part's own class on the meta device."""
    with torch.device("meta"):
        if part.library == "diffusers":
            model: nn.Module = getattr(diffusers, part.class_name)(**part.config)
        else:
            cls = getattr(transformers, part.class_name)
            model = cls(cls.config_class(**part.config))
    return model


def tensors(model: nn.Module, prefix: str = "") -> list[Tensor]:
    """What the file of ``model`` holds; tied weights stand in it once."""
    kinds = {
        id(parameter): _kind(module, leaf)
        for module in model.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    found = [
        Tensor(prefix + name, tuple(parameter.shape), DTYPE, kinds[id(parameter)])
        for name, parameter in model.named_parameters()
    ]
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            dtype = buffer.dtype if buffer.dtype == torch.int64 else DTYPE
            found.append(Tensor(prefix + name, tuple(buffer.shape), dtype, name.rpartition(".")[2]))
    return found


def _kind(module: nn.Module, leaf: str) -> str:
    if leaf == "bias":
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "scale"
    return "embedding" if isinstance(module, nn.Embedding) else "matrix"


def draw(tensor: Tensor, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tensor's values: a function of ``seed`` and its name, so that it does not matter what else is written.

    Matrices keep the variance of their input, so that activations stay of order 1 through all layers, and biases and
    scales differ from 0 and 1, so that a part which is left out shows.
    """
    if tensor.kind == "num_batches_tracked":
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{tensor.name}".encode()))
    values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(generator=generator)
    if tensor.kind == "matrix":
        fan_in = torch.Size(tensor.shape[1:]).numel()
        return values.mul_(fan_in**-0.5)
    if tensor.kind == "scale":
        return values.mul_(0.1).add_(1.0)
    if tensor.kind == "running_var":
        return values.mul_(0.2).exp_()
    return values if tensor.kind == "embedding" else values.mul_(0.1)


def split(wanted: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """The files' contents: tensors in their order, each file as full as ``shard_bytes`` allows."""
    files: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in wanted:
        if files[-1] and tensor.bytes > room:
            files.append([])
            room = shard_bytes
        files[-1].append(tensor)
        room -= tensor.bytes
    return files


def write(wanted: list[Tensor], folder: Path, stem: str, shard_bytes: int, seed: int) -> None:
    """Write the safetensors files of a part into ``folder``, and their index when there are several."""
    files = split(wanted, shard_bytes)
    if len(files) == 1:
        _write_file(folder / f"{stem}.safetensors", files[0], seed)
        return
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, start=1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, content, seed)
        weight_map |= {tensor.name: name for tensor in content}
    total = sum(tensor.bytes for tensor in wanted)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, content: list[Tensor], seed: int) -> None:
    # Wider elements first keeps each tensor aligned to its element size, as safetensors' own writer does.
    content = sorted(content, key=lambda tensor: -tensor.dtype.itemsize)
    with path.open("wb") as file:
        header = json.dumps(_header(content), separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in content:
            draw(tensor, seed).reshape(-1).view(torch.uint8).numpy().tofile(file)


def _header(content: list[Tensor]) -> Mapping[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in content:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    return header


def parameters(wanted: list[Tensor]) -> Iterator[int]:
    """Elements per tensor."""
    return (torch.Size(tensor.shape).numel() for tensor in wanted)
