"""The setting `transformer`: a file in place of the model's own transformer, found, checked and loaded by a rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from app.cluster.rank import Rank
from app.engine.checkpoint_files import CheckpointError
from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from app.model_files import check_local_checkpoint, fetch_and_check, transformer_file, wanted_files
from app.settings import Settings
from tests.engine import bfl
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny
from tests.local_group import MODEL


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux-tiny's transformer with every number doubled, so that it is not mistaken for the folder's."""
    state = {name: 2 * tensor for name, tensor in bfl.transformer_of(MODEL).items()}
    return bfl.write(state, tmp_path_factory.mktemp("files") / "flux1-tiny.safetensors")


def test_none_is_the_models_own() -> None:
    assert transformer_file(Settings()) is None


def test_a_rank_serves_the_files_transformer(file: Path, tmp_path: Path) -> None:
    """The folder needs no weights of its own then."""
    model = copy_of_flux_tiny(tmp_path / "model")
    (model / "transformer" / WEIGHTS).unlink()
    settings = Settings(model=str(model), transformer=str(file), threads_per_rank=1)
    check_local_checkpoint(settings)
    fetch_and_check(settings)
    rank = Rank(settings, 0)
    rank.load(None)
    assert rank._engine is not None
    ours = rank._engine.transformer.state_dict()
    theirs = load_transformer(MODEL, TensorParallelGroup(), torch.device("cpu"), torch.float32).state_dict()
    assert "proj_out.weight" in ours
    assert all(torch.equal(tensor, 2 * theirs[name]) for name, tensor in ours.items())


def test_a_path_is_relative_to_the_repository_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(transformer=f"models/flux-tiny/transformer/{WEIGHTS}")
    assert transformer_file(settings) == MODEL / "transformer" / WEIGHTS


def test_bfls_own_suffix_is_read(file: Path, tmp_path: Path) -> None:
    """The first release of FLUX.1 was ``flux1-dev.sft``."""
    check_local_checkpoint(Settings(transformer=str(shutil.copy(file, tmp_path / "flux1-dev.sft"))))


def test_the_check_before_the_start_reads_its_header(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read \(.+\): download it again"):
        check_local_checkpoint(Settings(transformer=str(cut)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flux1-dev-Q8_0.gguf", b"GGUF\x03", "is a GGUF file; only safetensors are read: use the model's safetensors"),
        ("flux1-dev.safetensors", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer and not the"),
        ("flux1-dev.tar", b"anything", "is no safetensors file; only safetensors are read"),
        ("flux1-dev.ckpt", b"PK\x03\x04", "is a pickle, which can run code when it is opened and is refused"),
        ("flux1-dev.safetensors", b"", "is empty: download it again"),
    ],
)
def test_a_file_that_is_not_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for check in (check_local_checkpoint, fetch_and_check):
        with pytest.raises(CheckpointError) as error:
            check(Settings(transformer=str(path)))
        assert f"transformer '{path}' {message}" in str(error.value)


def test_a_folder_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"is a folder: name one file in BFL's layout; a folder in diffusers' lay"
    ):
        check_local_checkpoint(Settings(transformer=str(MODEL / "transformer")))


def test_a_link_without_its_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "flux1-dev.safetensors").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"is a link to nowhere, which is not there: copy the files"):
        check_local_checkpoint(Settings(transformer=str(tmp_path / "flux1-dev.safetensors")))


def test_a_file_that_is_elsewhere_stops_the_replica_and_not_the_head(tmp_path: Path) -> None:
    settings = Settings(transformer=str(tmp_path / "flux1-dev.safetensors"))
    check_local_checkpoint(settings)
    with pytest.raises(FileNotFoundError, match=r"there is no file .+flux1-dev\.safetensors on this node; download it"):
        fetch_and_check(settings)


def test_of_the_models_transformer_the_configuration_is_downloaded(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert wanted_files(tmp_path, own_transformer=False) == ["model_index.json", "transformer/*.json"]
    assert "transformer/*.safetensors" in wanted_files(tmp_path)
