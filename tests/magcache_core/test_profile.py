"""The command that shows a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from magcache_core import profile as profile_cli


def test_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "p.png"
    profile_cli.main(["show", "flux.1-dev", "--png", str(png)])
    printed = capsys.readouterr().out
    assert "CCC..C...C.C.....C.....C..C." in printed
    assert "computes 9 of 28" in printed
    assert png.read_bytes().startswith(b"\x89PNG")
    profile_cli.main(["list"])
    assert "flux.1-dev" in capsys.readouterr().out
