"""A `model` that names something else than a model: the message says what it is, and what to name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.engine.checkpoint_files import CheckpointError
from app.model_files import check_local_checkpoint
from app.settings import Settings
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny
from tests.local_group import MODEL


def _refusal(model: str | Path) -> str:
    """The message of the check that runs before anything starts."""
    with pytest.raises(CheckpointError) as error:
        check_local_checkpoint(Settings(model=str(model)))
    return str(error.value)


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    return Path(shutil.copy(MODEL / "transformer" / WEIGHTS, tmp_path / "flux1-dev.safetensors"))


def test_a_single_file(single_file: Path) -> None:
    assert _refusal(single_file) == (
        f"model '{single_file}' is a single file: give it as `transformer`, and as `model` the folder or hub id that "
        "has all other parts, for example black-forest-labs/FLUX.1-dev"
    )


def test_a_folder_with_a_single_file(single_file: Path) -> None:
    message = _refusal(single_file.parent)
    assert "has no model_index.json, but the file flux1-dev.safetensors: give it as `transformer`" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flux1-dev-Q4_K_S.gguf", b"GGUF\x03", "is a single file: it is a GGUF file; only safetensors are read"),
        ("flux1-dev.ckpt", b"PK\x03\x04", "is a single file: it is a pickle, which can run code when it is opened"),
        ("flux1-dev.safetensors", b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer and not the"),
        ("flux1-dev.tar", b"anything", "is a single file: it is no safetensors file; only safetensors are read"),
    ],
)
def test_a_single_file_that_is_not_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in _refusal(tmp_path / name)


@pytest.mark.parametrize(
    "model", ["black-forest-labs/FLUX.1-dev/flux1-dev.safetensors", "/nowhere/flux1-dev.safetensors", "flux1-dev.gguf"]
)
def test_a_single_file_that_is_not_there(model: str) -> None:
    assert _refusal(model) == (
        f"model {model!r} names a single file, which is not there: download it, and give its path as `transformer`"
    )


@pytest.mark.parametrize("rest", ["", "/", "/tree/main", "/resolve/main/flux1-dev.safetensors"])
def test_an_address_on_the_hub(rest: str) -> None:
    message = _refusal(f"https://huggingface.co/black-forest-labs/FLUX.1-dev{rest}")
    assert message.endswith("is an address: write the hub id, black-forest-labs/FLUX.1-dev")


def test_one_part_of_a_model() -> None:
    assert _refusal(MODEL / "transformer").endswith(f"is one part of the model in {MODEL}: name that folder")


def test_the_folder_above_a_model(tmp_path: Path) -> None:
    copy_of_flux_tiny(tmp_path / "above" / "flux")
    assert _refusal(tmp_path / "above").endswith(f"{tmp_path / 'above' / 'flux'} has one: name that folder")


def test_an_entry_of_the_hubs_cache(tmp_path: Path) -> None:
    entry = tmp_path / "models--acme--flux"
    copy_of_flux_tiny(entry / "snapshots" / "0123")
    assert f"is an entry of the hub's cache: write the hub id, or one of the folders in {entry}" in _refusal(entry)


def test_an_empty_folder_may_be_filled_on_another_node(tmp_path: Path) -> None:
    check_local_checkpoint(Settings(model=str(tmp_path)))
