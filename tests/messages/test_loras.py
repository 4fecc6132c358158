"""A file that is replaced is another adapter; how strongly it acts is not part of it."""

from __future__ import annotations

from dataclasses import replace

from app.messages.loras import LoraUse


def test_name_and_digest_make_an_adapter() -> None:
    use = LoraUse("heart", 1.0, "1f", 10)
    assert use.content == replace(use, scale=0.5).content
    assert use.content != replace(use, digest="2e").content
