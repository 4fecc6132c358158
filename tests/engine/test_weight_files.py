"""Which files hold the weights: variants are read, and what stands in place of a missing file is named."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from app.engine.weight_files import encoder_variant, weight_files, weight_variant
from app.settings import Settings
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny
from tests.local_group import MODEL

INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of_flux_tiny(tmp_path / "model")


def _rename(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


def _shard(folder: Path, index: str, names: tuple[str, str]) -> None:
    """Spread the weights in ``folder`` over two files."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {name: sorted(tensors)[start::2] for start, name in enumerate(names)}
    for name, part in parts.items():
        save_file({one: tensors[one] for one in part}, folder / name)
    (folder / index).write_text(json.dumps({"weight_map": {one: name for name, part in parts.items() for one in part}}))


def test_a_variant_of_every_part_is_served(model: Path) -> None:
    """One file, several files with an index, and transformers' names."""
    _rename(model / "vae" / WEIGHTS, "diffusion_pytorch_model.bf16.safetensors")
    names = ("diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "diffusion_pytorch_model-00002-of-00002.bf16.safetensors")  # fmt: skip  # noqa: E501
    _shard(model / "transformer", "diffusion_pytorch_model.safetensors.index.bf16.json", names)
    _rename(model / "text_encoder" / "model.safetensors", "model.fp16.safetensors")
    check_checkpoint(model, 2)
    assert (weight_variant(model / "vae"), encoder_variant(model)) == ("bf16", "fp16")
    loaded, expected = (load_transformer(one, TensorParallelGroup(), torch.device("cpu"), torch.float32).state_dict()
                        for one in (model, MODEL))  # fmt: skip
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    ours, theirs = Settings(model=str(model)), Settings()
    encoded, plain = (asyncio.run(PromptEncoder(one).encode("a red circle")) for one in (ours, theirs))
    assert torch.equal(encoded.tokens, plain.tokens)
    latents = torch.randn(64, 64)
    images = [asyncio.run(ImageDecoder(one).decode(latents, 128, 128, "png", 0)) for one in (ours, theirs)]
    assert images[0] == images[1]


def test_plain_names_go_before_a_variant(model: Path) -> None:
    shutil.copy(model / "vae" / WEIGHTS, model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert weight_files(model / "vae") == [model / "vae" / WEIGHTS]
    assert weight_variant(model / "vae") is None


def _two_variants(model: Path) -> None:
    shutil.copy(model / "vae" / WEIGHTS, model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    _rename(model / "vae" / WEIGHTS, "diffusion_pytorch_model.bf16.safetensors")


def _two_encoder_variants(model: Path) -> None:
    _rename(model / "text_encoder" / "model.safetensors", "model.fp16.safetensors")
    _rename(model / "text_encoder_2" / "model.safetensors", "model.bf16.safetensors")


def _renamed(name: str) -> Callable[[Path], None]:
    return lambda model: _rename(model / "transformer" / WEIGHTS, name)


def _renamed_encoder(name: str) -> Callable[[Path], None]:
    return lambda model: _rename(model / "text_encoder_2" / "model.safetensors", name)


def _index_of(content: object) -> Callable[[Path], None]:
    return lambda model: (model / "transformer" / INDEX).write_text(json.dumps(content)) and None


ABSENT = r"transformer/diffusion_pytorch_model\.safetensors is missing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_two_variants, r"vae has the variants bf16, fp16 of diffusion_pytorch_model: keep the files of one of them"),
        (_two_encoder_variants, r"the text encoders are of the variants bf16, fp16: use one"),
        (_renamed("model.gguf"), ABSENT + r" \(model\.gguf is a GGUF file; only safetensors are read"),
        (_renamed("diffusion_pytorch_model.ckpt"), ABSENT + r" \(diffusion_pytorch_model\.ckpt is a pickle"),
        (_renamed(f"{WEIGHTS}.aria2"), ABSENT + r" \(.+\.aria2 is an unfinished download: let it finish\)"),
        (_renamed("3f8a.incomplete"), ABSENT + r" \(3f8a\.incomplete is an unfinished download"),
        (
            _renamed("flux1-dev.safetensors"),
            ABSENT + r" \(there is flux1-dev\.safetensors: one file .+ `transformer`\)",
        ),
        (
            _renamed("diffusion_pytorch_model-00001-of-00003.safetensors"),
            ABSENT + r" \(.+-00001-of-00003\.safetensors is one of several files, and their index is missing: download",
        ),
        (_renamed_encoder("t5xxl_fp16.safetensors"), r"is missing \(there is t5xxl_fp16\.safetensors: if it holds the"),
        (
            _index_of({"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}),
            r"00001-of-00002\.safetensors is missing, and diffusion_pytorch_model\.safetensors\.index\.json names it",
        ),
        (
            _index_of({"weight_map": {"x_embedder.weight": "../secret.safetensors"}}),
            r"index\.json has no weight_map of",
        ),
        (_index_of({"weight_map": {"x_embedder.weight": 1}}), r"index\.json has no weight_map of tensors and files"),
        (_index_of({"weight_map": ["a.safetensors"]}), r"index\.json has no weight_map of tensors and files"),
    ],
    ids=lambda value: value[-50:] if isinstance(value, str) else None,
)
def test_what_stands_in_its_place_is_named(model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(model, 1)
