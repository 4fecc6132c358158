"""Slices of tensors in a safetensors file, read without a memory map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.engine import checkpoint_files
from app.engine.checkpoint_files import CheckpointError, SafetensorsFile


@pytest.mark.parametrize("buffer_bytes", [1, 100, 8 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("dim", "ranges"),
    [(0, []), (0, [(0, 3)]), (0, [(4, 7)]), (1, [(2, 4)]), (1, [(0, 1), (5, 9)]), (0, [(0, 2), (6, 7)]), (1, [(0, 9)])],
)
def test_slices_are_those_of_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, dtype: torch.dtype, dim: int, ranges
) -> None:
    monkeypatch.setattr(checkpoint_files, "BUFFER_BYTES", buffer_bytes)
    tensors = {name: torch.randn(7, 9).to(dtype) for name in ("one", "two")}
    save_file(tensors, tmp_path / "file.safetensors")
    with SafetensorsFile(tmp_path / "file.safetensors") as file:
        for name, tensor in tensors.items():
            parts = [
                tensor.float().narrow(dim, begin, end - begin) for begin, end in ranges or [(0, tensor.shape[dim])]
            ]
            got = file.read(name, dim, ranges)
            assert got.dtype == dtype
            assert torch.equal(got.float(), torch.cat(parts, dim))


def test_vectors_and_empty_shapes_are_read(tmp_path: Path) -> None:
    tensors = {"vector": torch.arange(6.0), "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "file.safetensors")
    with SafetensorsFile(tmp_path / "file.safetensors") as file:
        assert torch.equal(file.read("vector", 0, [(2, 4)]), torch.tensor([2.0, 3.0]))
        assert torch.equal(file.read("scalar", 0, []), torch.tensor(3.0))
        assert file.read("none", 0, []).shape == (0, 4)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"mask": torch.ones(2, dtype=torch.bool)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"mask is of type BOOL; read are F64, F32"):
        SafetensorsFile(tmp_path / "file.safetensors")
