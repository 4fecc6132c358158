"""The README's script runs as it stands, on the shipped model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_readme_script_makes_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "magcache_core" / "README.md").read_text(encoding="utf-8")
    script = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    assert len([line for line in script.splitlines() if line.strip()]) <= 12
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    assert re.search(r"^C[C.]{27} computes \d+ of 28 steps$", capsys.readouterr().out, flags=re.MULTILINE)
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (128, 128)
