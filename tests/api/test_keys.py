"""The file of API keys: its form, and what becomes of the keys when it changes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from app.api.keys import ApiKeys
from app.errors import UnauthorizedError


def test_names_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\n\n  alice   k1 \nbob k2\nalice k3\n", encoding="utf-8")
    keys = ApiKeys(str(path))
    found = [
        keys.name_of(f"{scheme} {key}") for scheme, key in (("Bearer", "k1"), ("bearer", "k2"), ("BEARER", " k3 "))
    ]
    assert found == ["alice", "bob", "alice"]
    for header in (
        None,
        "",
        "k1",
        "Bearer",
        "Bearer ",
        "Bearer k",
        "Bearer k11",
        "Bearer alice",
        "Token k1",
        "Bearer ü",
    ):
        with pytest.raises(UnauthorizedError):
            keys.name_of(header)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no key"),
        (b"# alice k1\n", "holds no key"),
        (b"alice k1\nsecret\n", "line 2 is not a name, a space and a key"),
        (b"alice secret more\n", "line 1 is not"),
        (b"alice k1\nbob k1\n", "the key of line 2 is there twice"),
        (b"alice \xff\n", "no UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_stops_the_start_and_shows_no_key(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        ApiKeys(str(path))
    assert str(path) in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_changed_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Kubernetes changes a mounted secret: a link leads to a new file."""
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "keys"
    first.write_text("alice k1\n", encoding="utf-8")
    second.write_text("alice k2\n", encoding="utf-8")
    link.symlink_to(first)
    keys = ApiKeys(str(link))
    assert keys.name_of("Bearer k1") == "alice"
    with caplog.at_level(logging.INFO, logger="app.api.keys"):
        new = tmp_path / "new"
        new.symlink_to(second)
        os.replace(new, link)
        assert keys.name_of("Bearer k2") == "alice"
    with pytest.raises(UnauthorizedError):
        keys.name_of("Bearer k1")
    assert "1 API key(s) read" in caplog.text
    assert "k2" not in caplog.text


def test_a_file_that_breaks_leaves_the_former_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("alice k1\n", encoding="utf-8")
    keys = ApiKeys(str(path))
    for change in (lambda: path.write_text("half a line of a", encoding="utf-8"), path.unlink):
        change()
        assert keys.name_of("Bearer k1") == "alice"
        with pytest.raises(UnauthorizedError):
            keys.name_of("Bearer a")
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2  # once for each change
    path.write_text("alice k9\n", encoding="utf-8")
    assert keys.name_of("Bearer k9") == "alice"
