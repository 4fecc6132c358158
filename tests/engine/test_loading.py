"""A transformer's weights are those that diffusers loads, from one file or several; a bad file is one error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from app.engine.checkpoint_files import CheckpointError
from app.engine.fused import fuse
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
    theirs = FluxTransformer2DModel.from_pretrained(
        MODEL, subfolder="transformer", dtype=torch.float32, low_cpu_mem_usage=False
    )
    fuse(theirs)
    expected = theirs.state_dict()
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


def test_a_tensor_in_two_files_is_refused(copy: Path) -> None:
    folder = copy / "transformer"
    shutil.copy(folder / SINGLE_FILE, folder / "b.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": SINGLE_FILE, "y": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors holds .+ once more"):
        load(copy)
