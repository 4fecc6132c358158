"""Files that are not what their names say: each is named, with the remedy, by the check before the start."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from app.engine.foreign_files import foreign
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny
from tests.local_group import MODEL

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 23802932552\n"
PAGE = b"\n<!DOCTYPE html>\n<html class=''><head><title>flux1-dev.safetensors</title>"
VAE = f"vae/{WEIGHTS}"
T5 = "text_encoder_2/model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of_flux_tiny(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (VAE, LFS, "is a Git LFS pointer and not the file: run `git lfs pull`"),
        (T5, LFS, "is a Git LFS pointer and not the file: run `git lfs pull`"),
        ("vae/config.json", LFS, "is a Git LFS pointer and not the file: run `git lfs pull`"),
        ("tokenizer_2/tokenizer.json", LFS, "is a Git LFS pointer and not the file: run `git lfs pull`"),
        (VAE, PAGE, "is a web page and not the file: download it from the address that has /resolve/"),
        ("model_index.json", PAGE, "is a web page and not the file"),
        (VAE, b"Access to model x/y is restricted.\nLog in", "is a server's refusal ('Access to model x/y is restri"),
        (VAE, b"Entry not found", "is a server's refusal ('Entry not found'): download it again, with a token if"),
        (
            VAE,
            b"GGUF\x03\x00\x00\x00",
            "is a GGUF file; only safetensors are read: use the model's safetensors weights",
        ),
        (VAE, pickle.dumps({"a": 1}), "is a pickle, which can run code when it is opened and is refused"),
        (VAE, b"\x1f\x8b\x08\x00", "is compressed (gzip): unpack it"),
        (VAE, b"", "is empty: download it again"),
        ("scheduler/scheduler_config.json", b"", "is empty: download it again"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)
def test_a_file_of_another_kind_is_named(model: Path, name: str, content: bytes, message: str) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(model, 1)
    assert f"{model / name} {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_torchs_own_format_is_a_pickle(model: Path) -> None:
    torch.save({"a": torch.ones(2)}, model / VAE)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is a pickle"):
        check_checkpoint(model, 1)


def test_a_copied_cache_without_its_files_is_named(model: Path) -> None:
    """The hub's cache has links to a folder beside the snapshot, which a plain copy leaves behind."""
    (model / VAE).unlink()
    (model / VAE).symlink_to("../../../blobs/f5b59a26851551b67ae1")
    message = (
        r"vae/diffusion_pytorch_model\.safetensors is a link to \.\./\.\./\.\./blobs/f5b5.+ which is not there: copy"
    )
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(model, 1)


def test_a_folder_in_a_files_place_is_named(model: Path) -> None:
    (model / VAE).unlink()
    (model / VAE).mkdir()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is a folder and not a file"):
        check_checkpoint(model, 1)


def test_the_files_of_a_model_are_not_foreign() -> None:
    files = [path for path in MODEL.rglob("*") if path.suffix in (".json", ".safetensors")]
    assert len(files) > 12
    assert [foreign(path) for path in files] == [None] * len(files)
