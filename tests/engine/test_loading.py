from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from app.engine import checkpoint_files
from app.engine.checkpoint_files import CheckpointError, SafetensorsFile
from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from tests.local_group import MODEL

SINGLE_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"


def load(model: Path) -> FluxTransformer2DModel:
    return load_transformer(model, TensorParallelGroup(), torch.device("cpu"), torch.float32)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(MODEL / "transformer", tmp_path / "transformer")
    return tmp_path


def test_loads_what_diffusers_loads() -> None:
    expected = FluxTransformer2DModel.from_pretrained(
        MODEL, subfolder="transformer", dtype=torch.float32, low_cpu_mem_usage=False
    ).state_dict()
    ours = load(MODEL).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_loads_a_sharded_checkpoint(copy: Path) -> None:
    folder = copy / "transformer"
    tensors = load_file(folder / SINGLE_FILE)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    expected = load(MODEL).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(copy).state_dict().items())


def _remove(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()


def _pickle(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "diffusion_pytorch_model.bin")


def _truncate(folder: Path) -> None:
    data = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(data[: len(data) // 2])


def _another_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def _lacks_a_tensor(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.pop("x_embedder.weight"))


def _unknown_tensor(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}))


def _wrong_shape(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"x_embedder.weight": torch.zeros(3, 3)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, r"diffusion_pytorch_model\.safetensors is missing$"),
        (_pickle, r"is missing \(diffusion_pytorch_model\.bin is a pickle and is refused"),
        (_truncate, r"diffusion_pytorch_model\.safetensors cannot be read"),
        (_another_class, r"config\.json names the class 'UNet2DModel'; supported are FluxTransformer2DModel"),
        (_broken_config, r"config\.json is not valid JSON"),
        (_no_config, r"config\.json is missing"),
        (_lacks_a_tensor, r"lacks 1 tensors of the transformer, among them x_embedder\.weight"),
        (_unknown_tensor, r"holds the tensor 'extra\.weight'"),
        (_wrong_shape, r"x_embedder\.weight has shape \(3, 3\), config\.json asks for \(192, 64\)"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(copy: Path, damage, message: str) -> None:
    damage(copy / "transformer")
    with pytest.raises(CheckpointError, match=message):
        load(copy)


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


def test_a_tensor_in_two_files_is_refused(copy: Path) -> None:
    folder = copy / "transformer"
    shutil.copy(folder / SINGLE_FILE, folder / "b.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": SINGLE_FILE, "y": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors holds .+ once more"):
        load(copy)
