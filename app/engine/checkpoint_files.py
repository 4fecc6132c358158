"""The files of a checkpoint: JSON, and slices of the tensors in a safetensors file, read without a memory map.

safetensors' own ``safe_open`` maps the file, and a mapped page counts as the process's memory once it is touched: for
half of the columns of each matrix it adds three times their size to the peak, plain reads once (docs/adr/0009). The
page cache, which ranks share, serves both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from app.engine import quantized
from app.engine.foreign_files import foreign

BUFFER_BYTES = 8 << 20
"""How much of a column-sliced matrix is read at once."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file or number and what to do."""


def refuse_foreign(path: Path) -> None:
    """Raise a `CheckpointError` if ``path`` is a file of another kind; see `foreign`."""
    if what := foreign(path):
        raise CheckpointError(f"{path} {what}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged or something else.
    """
    try:
        refuse_foreign(path)
        if not path.exists():
            raise CheckpointError(f"{path} is missing: is this a model folder in diffusers layout?")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file.

    Attributes:
        offset: in bytes from the start of the file.
        halves_swapped: the second half of the rows stands before the first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    halves_swapped: bool = False


class SafetensorsFile:
    """An open safetensors file; a context manager.

    Attributes:
        tensors: its tensors by name, in the order of the data.
    """

    tensors: Mapping[str, StoredTensor]

    def __init__(self, path: Path) -> None:
        """Open ``path`` and read its header.

        Raises:
            CheckpointError: it cannot be read, is truncated or no safetensors file.
        """
        self.path = path
        self.tensors = _read_header(path)
        self._file = os.open(path, os.O_RDONLY)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def refuse_quantized(self) -> None:
        """Raise a `CheckpointError` if the tensors are those of a quantized model, which lie beside their scales."""
        if method := quantized.method_of_tensors(self.tensors):
            raise CheckpointError(
                f"{self.path}: the weights are quantized ({method}), which is not read: {quantized.REMEDY}"
            )

    def read(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The ``ranges`` (begin, end) of a tensor along ``dim`` (0 or 1), joined along it; no ranges read all of it.

        Raises:
            CheckpointError: the file ended or could not be read.
        """
        stored = self.tensors[name]
        shape = list(stored.shape)
        if ranges:
            shape[dim] = sum(end - begin for begin, end in ranges)
        out = torch.empty(shape, dtype=stored.dtype)
        if stored.halves_swapped:
            assert not ranges, f"{name} is read whole"
            half = len(out) // 2
            self._read_into(out[half:], stored.offset)
            self._read_into(out[:half], stored.offset + out[half:].nbytes)
        elif not ranges:
            self._read_into(out, stored.offset)
        elif dim == 0:
            row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
            at = 0
            for begin, end in ranges:
                self._read_into(out[at : at + end - begin], stored.offset + begin * row_bytes)
                at += end - begin
        else:
            self._read_columns(stored, ranges, out)
        return out

    def _read_columns(self, stored: StoredTensor, ranges: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
        """Columns are scattered in the file, so whole rows are read through a small buffer."""
        rows, columns = stored.shape
        row_bytes = columns * stored.dtype.itemsize
        count = max(BUFFER_BYTES // row_bytes, 1)
        if self._buffer.numel() < count * row_bytes:
            self._buffer = torch.empty(count * row_bytes, dtype=torch.uint8)
        for first in range(0, rows, count):
            last = min(first + count, rows)
            chunk = self._buffer[: (last - first) * row_bytes].view(stored.dtype).view(last - first, columns)
            self._read_into(chunk, stored.offset + first * row_bytes)
            at = 0
            for begin, end in ranges:
                out[first:last, at : at + end - begin] = chunk[:, begin:end]
                at += end - begin

    def _read_into(self, out: torch.Tensor, offset: int) -> None:
        # One read moves 2 GiB at most.
        left = out.reshape(-1).view(torch.uint8).numpy().data
        try:
            while left:
                done = os.preadv(self._file, [left], offset)
                if done == 0:
                    raise CheckpointError(f"{self.path} ends early: download it again")
                left, offset = left[done:], offset + done
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        refuse_foreign(path)
        # safe_open validates the file but does not expose offsets, so the header is parsed again.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            advice = f": weights are quantized, {quantized.REMEDY}" if entry["dtype"] in quantized.TYPES else ""
            raise CheckpointError(f"{path}: {name} is of type {entry['dtype']}; read are {', '.join(_DTYPES)}{advice}")
        offset = 8 + length + entry["data_offsets"][0]
        found[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], offset)
    return dict(sorted(found.items(), key=lambda item: item[1].offset))
