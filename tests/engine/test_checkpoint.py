"""A whole checkpoint is checked before anything starts: what is wrong is one message that names the file or number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from benchmarks.checkpoints.geometry import MODELS
from benchmarks.make_checkpoint import make_checkpoint
from tests.local_group import MODEL

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("flux.1-dev", "tiny", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_good_checkpoint_passes(tmp_path: Path, name: str, size: int) -> None:
    check_checkpoint(make_checkpoint(name, "tiny", tmp_path / "model"), size)


def test_the_shipped_model_passes() -> None:
    check_checkpoint(MODEL, 2)


def _remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def _truncate(name: str) -> Damage:
    def cut(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[:-100])

    return cut


def _write(name: str, content: str) -> Damage:
    return lambda model: (model / name).write_text(content)


def _edit(name: str, **values: object) -> Damage:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | values))

    return change


def _rename(name: str, to: str) -> Damage:
    return lambda model: (model / name).rename((model / name).with_name(to)) and None


def _without(name: str, tensor: str) -> Damage:
    def drop(model: Path) -> None:
        tensors = load_file(model / name)
        del tensors[tensor]
        save_file(tensors, model / name)

    return drop


def _reshape(name: str, tensor: str) -> Damage:
    def change(model: Path) -> None:
        save_file(load_file(model / name) | {tensor: torch.zeros(2, 2)}, model / name)

    return change


SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
CLIP = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("model_index.json"), r"model_index\.json is missing"),
        (_remove(SHARD), r"00002-of-00003\.safetensors is missing"),
        (_truncate(SHARD), r"00002-of-00003\.safetensors cannot be read \(.+\): download it again"),
        (
            _write(SHARD, "version https://git-lfs.github.com/spec/v1"),
            r"00002-of-00003\.safetensors is a Git LFS pointer",
        ),
        (_write(INDEX, "{}"), r"index\.json has no weight_map"),
        (_remove("transformer/config.json"), r"transformer/config\.json is missing"),
        (_truncate("text_encoder_2/model-00002-of-00002.safetensors"), r"text_encoder_2/model-00002-of-00002\.saf"),
        (_remove(CLIP), r"text_encoder/model\.safetensors is missing$"),
        (_rename(CLIP, "pytorch_model.bin"), r"is missing \(pytorch_model\.bin is a pickle and is refused"),
        (_rename(VAE, "diffusion_pytorch_model.bin"), r"\(diffusion_pytorch_model\.bin is a pickle and is refused"),
        (_truncate(VAE), r"vae/diffusion_pytorch_model\.safetensors cannot be read"),
        (
            _without(VAE, "decoder.conv_in.weight"),
            r"vae lacks 1 tensors of the vae, among them decoder\.conv_in\.weight",
        ),
        (_without(CLIP, "text_model.final_layer_norm.bias"), r"text_encoder lacks 1 tensors of the text encoder"),
        (_reshape(CLIP, "text_model.final_layer_norm.bias"), r"final_layer_norm\.bias has shape \(2, 2\)"),
        (_edit("model_index.json", _class_name="StableDiffusionPipeline"), r"'StableDiffusionPipeline'; served are"),
        (
            _edit("model_index.json", vae=["diffusers", "VQModel"]),
            r"vae is 'VQModel'; this pipeline's is AutoencoderKL",
        ),
        (_edit("model_index.json", vae=[None, None]), r"vae is None; this pipeline's is AutoencoderKL"),
        (_edit("transformer/config.json", _class_name="UNet2DModel"), r"config\.json names the class 'UNet2DModel'"),
        (_edit("text_encoder/config.json", architectures=["BertModel"]), r"names the class 'BertModel'; supported is"),
        (_edit("text_encoder/config.json", hidden_size="wide"), r"config\.json does not describe a CLIPTextModel"),
        (_edit("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), r"names the class 'DDIMScheduler'"),
        (_remove("tokenizer/merges.txt"), r"tokenizer has no tokenizer: it needs tokenizer\.json or vocab\.json with"),
        (_remove("tokenizer_2/tokenizer_config.json"), r"tokenizer_2/tokenizer_config\.json is missing"),
    ],
)
def test_what_is_wrong_is_named(model: Path, damage: Damage, message: str) -> None:
    damage(model)
    with pytest.raises(CheckpointError, match=message) as error:
        check_checkpoint(model, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [4, 5, 12])
def test_a_split_that_the_heads_do_not_allow_is_named(whole: Path, size: int) -> None:
    message = rf"tensor_parallel_size {size} does not divide the 6 attention heads .+: use one of \[1, 2, 3, 6\]"
    with pytest.raises(ValueError, match=message):
        check_checkpoint(whole, size)
