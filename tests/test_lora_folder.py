"""What a folder of adapters offers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from app.engine.lora_files import lora_digest
from app.lora_folder import common_listing, lora_folder, lora_targets, read_listing
from app.messages.loras import LoraFile, LoraListing
from app.settings import Settings
from tests.lora_files import WIDTH, weights_of, write_lora


def listing_of(settings: Settings) -> LoraListing:
    return read_listing(settings, lora_targets(settings))


def test_files_are_offered_by_their_path_without_the_suffix(tmp_path: Path) -> None:
    write_lora(tmp_path / "star.safetensors")
    write_lora(tmp_path / "styles" / "v1.5 soft.safetensors", rank=4)
    write_lora(tmp_path / ".cache" / "hidden.safetensors")
    (tmp_path / "README.md").write_text("notes")
    listing = listing_of(Settings(loras=str(tmp_path)))
    assert listing.refused == {}
    assert listing.offered == {
        "star": LoraFile("star", lora_digest(tmp_path / "star.safetensors"), 2, weights_of(2) * 4),
        "styles/v1.5 soft": LoraFile(
            "styles/v1.5 soft", lora_digest(tmp_path / "styles/v1.5 soft.safetensors"), 4, weights_of(4) * 4
        ),
    }


def test_the_memory_is_that_of_the_ranks_precision(tmp_path: Path) -> None:
    write_lora(tmp_path / "star.safetensors")
    listing = listing_of(Settings(loras=str(tmp_path), dtype="bfloat16"))
    assert listing.offered["star"].nbytes == weights_of(2) * 2


def test_other_files_are_refused_with_a_reason_that_has_no_path_of_the_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lora(tmp_path / "good.safetensors")
    write_lora(tmp_path / "wide.safetensors", width=WIDTH + 1)
    write_lora(tmp_path / "large.safetensors", rank=32)
    write_lora(tmp_path / "tab\tname.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with caplog.at_level(logging.WARNING):
        listing = listing_of(Settings(loras=str(tmp_path), loras_bytes=40_000))
    assert set(listing.offered) == {"good"}
    assert set(listing.refused) == {"wide", "large", "'tab\\tname'", "old.ckpt", "broken"}
    assert "loras_bytes" in listing.refused["large"]
    assert "convert it" in listing.refused["old.ckpt"]
    for name, reason in listing.refused.items():
        assert str(tmp_path) not in reason
        assert any(name in record.message and reason in record.message for record in caplog.records)


def test_a_replaced_file_has_another_digest(tmp_path: Path) -> None:
    settings = Settings(loras=str(tmp_path))
    write_lora(tmp_path / "star.safetensors", rank=2)
    before = listing_of(settings).offered["star"].digest
    write_lora(tmp_path / "star.safetensors", rank=3)
    assert listing_of(settings).offered["star"].digest != before


def test_without_the_setting_there_is_no_folder() -> None:
    assert lora_folder(Settings()) is None
    assert listing_of(Settings()) == LoraListing()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"loras '{tmp_path}/nothing'.*mount it on all nodes"):
        lora_folder(Settings(loras=f"{tmp_path}/nothing"))


def test_what_nodes_find_differently_is_not_offered() -> None:
    def listing(**digests: str) -> LoraListing:
        return LoraListing({name: LoraFile(name, digest, 2, 8) for name, digest in digests.items()}, {"x": "broken"})

    common = common_listing([listing(a="1", b="1", c="1"), listing(a="1", b="2")])
    assert set(common.offered) == {"a"}
    assert set(common.refused) == {"x", "b", "c"}
    assert "one folder" in common.refused["b"]
    assert common_listing([listing(a="1")]) == listing(a="1")
