"""docs/metrics.md is what `python -m app.metrics` prints."""

from __future__ import annotations

from pathlib import Path

from app.metrics.__main__ import document


def test_the_document_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs/metrics.md"
    assert path.read_text(encoding="utf-8") == document(), "run `make metrics`"
