"""Adapters are loaded beside the steps, by the engine's own reader."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from app.cluster.rank_loras import RankLoras
from app.engine.engine import Engine
from app.engine.lora import Loras
from app.engine.lora_names import LoraError
from app.messages.loras import LoraUse
from tests.local_group import MODEL
from tests.lora_files import write_lora
from tests.patience import wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def loras(folder: Path) -> Loras:
    loras = Engine(MODEL, loras=folder).loras
    assert loras is not None
    return loras


@pytest.fixture
def rank(loras: Loras) -> RankLoras:
    return RankLoras(loras)


def holds(loras: Loras, name: str, digest: str) -> bool:
    try:
        return loras.hold([LoraUse(name, 1.0, digest)]) is not None
    except LookupError:
        return False


def test_an_adapter_is_loaded_by_and_by_and_freed(folder: Path, loras: Loras, rank: RankLoras) -> None:
    digest = write_lora(folder / "styles" / "a.safetensors")
    wait_for(lambda: rank.load("styles/a", digest), "it is loaded", 60)
    assert holds(loras, "styles/a", digest)
    assert rank.load("styles/a", digest)
    rank.drop("styles/a", digest)
    rank.drop("unknown", digest)
    wait_for(lambda: not holds(loras, "styles/a", digest), "it is dropped", 60)


def test_a_replaced_file_is_refused_and_tried_again(folder: Path, loras: Loras, rank: RankLoras) -> None:
    digest = write_lora(folder / "b.safetensors")
    write_lora(folder / "b.safetensors", fill=0.02)
    with pytest.raises(LoraError, match="replaced since it was listed"):
        wait_for(lambda: rank.load("b", digest), "it is loaded", 60)
    assert not holds(loras, "b", digest)
    write_lora(folder / "b.safetensors")
    wait_for(lambda: rank.load("b", digest), "it is loaded", 60)


def test_asking_does_not_wait_for_the_disk(folder: Path, loras: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = write_lora(folder / "c.safetensors")
    disk, load = threading.Event(), loras.load

    def slowly(name: str, digest: str) -> None:
        disk.wait(60)
        load(name, digest)

    monkeypatch.setattr(loras, "load", slowly)
    rank = RankLoras(loras)
    assert not rank.load("c", digest)
    assert not rank.load("c", digest)
    rank.drop("c", digest)  # after the load, in the order of the calls
    disk.set()
    wait_for(lambda: rank.load("c", digest), "it is loaded", 60)
    assert holds(loras, "c", digest)
