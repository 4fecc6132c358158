"""One file in BFL's layout is the transformer that diffusers makes of it, and each rank reads its slices."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine import checkpoint_files
from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from app.engine.engine import Engine
from app.engine.fused import fuse
from app.engine.loading import load_transformer, meta_transformer
from app.engine.parallel import TensorParallelGroup
from benchmarks.make_checkpoint import make_checkpoint
from tests.engine import bfl
from tests.local_group import MODEL, execute, job, plans, random_conditioning

CPU = torch.device("cpu")
NAMES = ("flux-tiny", "flux.1-schnell", "flux.2-klein-4b")
COMFY = "model.diffusion_model."
ASKED = job("a/0", size=(64, 64), steps=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"flux-tiny": MODEL} | {name: make_checkpoint(name, "tiny", folder / name) for name in NAMES[1:]}


@pytest.fixture(scope="module")
def files(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        name: bfl.write(bfl.transformer_of(model), folder / f"{name}.safetensors") for name, model in models.items()
    }


def _load(model: Path, file: Path | None, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    group = TensorParallelGroup(rank, size)
    return load_transformer(model, group, CPU, torch.float32, single_file=file).state_dict()


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor.float())] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_diffusers_converts_it_to(models: dict[str, Path], files: dict[str, Path], name: str) -> None:
    converted = bfl.diffusers_of(files[name])
    _equal(converted, {key: value.to(converted[key].dtype) for key, value in bfl.transformer_of(models[name]).items()})
    loaded = _load(models[name], files[name])
    slots = fuse(meta_transformer(models[name] / "transformer"))
    found = {key: loaded[slots[key].parameter][slots[key].begin : slots[key].end] for key in slots}
    _equal(found | {key: loaded[key] for key in converted.keys() - slots.keys()}, converted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_holds_the_slices_that_it_has_of_the_folder(
    models: dict[str, Path], files: dict[str, Path], name: str, size: int
) -> None:
    check_checkpoint(models[name], size, single_file=files[name])
    for rank in range(size):
        _equal(_load(models[name], files[name], rank, size), _load(models[name], None, rank, size))


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_reads_no_more_than_of_the_folder(
    models: dict[str, Path], files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def count(file: int, buffers: list, offset: int) -> int:
        counts.append(os.preadv(file, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(checkpoint_files, "os", type("Counting", (), {**vars(os), "preadv": staticmethod(count)}))
    _load(models[name], None, 1, 3)
    folder = sum(counts)
    counts.clear()
    _load(models[name], files[name], 1, 3)
    assert sum(counts) == folder


def test_the_image_is_the_folders(files: dict[str, Path]) -> None:
    """On one rank; tests/engine/test_models_parallel.py has two and three."""
    formed, tensors = plans([ASKED]), {"a/0": random_conditioning(ASKED)}
    folder, file = (execute(Engine(MODEL, single_file=one), formed, tensors) for one in (None, files["flux-tiny"]))
    assert torch.equal(file["a/0"], folder["a/0"])


def test_comfyuis_prefix_and_other_parts_are_passed_over(tmp_path: Path) -> None:
    beside = {"vae.decoder.conv_in.weight": torch.zeros(2, 2), "text_encoders.clip_l.logit_scale": torch.ones(1)}
    file = bfl.write(bfl.transformer_of(MODEL), tmp_path / "all-in-one.safetensors", COMFY, beside)
    check_checkpoint(MODEL, 2, single_file=file)
    _equal(_load(MODEL, file), _load(MODEL, None))


def test_diffusers_names_in_one_file_are_read_as_well() -> None:
    file = MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    check_checkpoint(MODEL, 2, single_file=file)
    _equal(_load(MODEL, file, 1, 2), _load(MODEL, None, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_numbers_without_scales_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in bfl.bfl_of(bfl.transformer_of(MODEL)).items()}
    save_file(state, tmp_path / "flux1-dev-fp8.safetensors")
    check_checkpoint(MODEL, 1, single_file=tmp_path / "flux1-dev-fp8.safetensors")
    whole = _load(MODEL, None)
    for rank in range(2):
        ours = _load(MODEL, tmp_path / "flux1-dev-fp8.safetensors", rank, 2)
        _equal(ours, {name: tensor.to(dtype) for name, tensor in _load(MODEL, None, rank, 2).items()})
    assert whole["norm_out.linear.weight"].shape == (384, 192)


def _with(**tensors: torch.Tensor) -> Callable[[bfl.State], bfl.State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def _only(part: str) -> Callable[[bfl.State], bfl.State]:
    return lambda state: {name: tensor for name, tensor in state.items() if part in name}


def _without(part: str) -> Callable[[bfl.State], bfl.State]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


OF_ANOTHER = "name in `model` the model that the file belongs to"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _with(scaled_fp8=torch.zeros(0)),
            r"the weights are quantized \(scaled fp8, as 'scaled_fp8' shows\), which is",
        ),
        (_with(double_blocks__0__img_mlp__0__scale_weight=torch.ones(1)), r"quantized \(scaled fp8, as 'double_blocks"),
        (_with(img_in__comfy_quant=torch.ones(1)), r"quantized \(ComfyUI's quantization"),
        (_with(img_in__weight=torch.zeros(4, 4, dtype=torch.uint8)), r"of type U8; read are .+: weights are quantized"),
        (_with(img_in__weight=torch.zeros(192, 384)), r"img_in\.weight has shape \(192, 384\).+; FLUX\.1-Fill, -Canny"),
        (_with(txt_in__weight=torch.zeros(192, 4096)), rf"txt_in\.weight has shape \(192, 4096\), .+: {OF_ANOTHER}$"),
        (_without("guidance_in"), rf"lacks 4 tensors of the transformer, among them guidance_in.+: {OF_ANOTHER}"),
        (_without("double_blocks.1."), r"lacks 24 tensors of the transformer, among them double_blocks\.1\.img_attn"),
        (
            _with(single_blocks__4__linear1__weight=torch.ones(1)),
            r"holds the tensor 'single_blocks\.4\.linear1\.weight'",
        ),
        (_only("txt_in"), r"holds no FLUX transformer \(its first tensor: txt_in\.(bias|weight)\)"),
        (lambda state: {}, r"holds no FLUX transformer \(its first tensor: none\)"),
        (_with(double_blocks__0__img_mlp__0__lora_A__weight=torch.ones(1)), r"is a LoRA and not a transformer"),
        (_with(controlnet_blocks__0__weight=torch.ones(1)), r"is a ControlNet and not a transformer"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, files: dict[str, Path], change: Callable[[bfl.State], bfl.State], message: str
) -> None:
    save_file(change(load_file(files["flux-tiny"])), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"other\.safetensors.*{message}"):
        check_checkpoint(MODEL, 1, single_file=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("model", "file", "message"),
    [
        ("flux.1-schnell", "flux-tiny", r"lacks \d+ tensors|holds the tensor|has shape"),
        ("flux.2-klein-4b", "flux-tiny", r"has shape|lacks"),
        ("flux-tiny", "flux.2-klein-4b", r"has shape|lacks"),
    ],
)
def test_a_file_of_another_model_is_refused(
    models: dict[str, Path], files: dict[str, Path], model: str, file: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors.*({message}).*: {OF_ANOTHER}"):
        check_checkpoint(models[model], 1, single_file=files[file])


def test_a_guided_file_is_not_schnells(tmp_path: Path, models: dict[str, Path], files: dict[str, Path]) -> None:
    guidance = {f"guidance_in.{layer}.bias": torch.zeros(96) for layer in ("in_layer", "out_layer")}
    save_file(load_file(files["flux.1-schnell"]) | guidance, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"holds the tensor 'guidance_in\.in_layer\.bias', unlike .+: {OF_ANOTHER}"
    ):
        check_checkpoint(models["flux.1-schnell"], 1, single_file=tmp_path / "flux1-dev.safetensors")
