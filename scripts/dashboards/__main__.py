"""``python -m scripts.dashboards`` writes k8s/base/dashboards/*.json; a test compares."""

from __future__ import annotations

from pathlib import Path

from scripts.dashboards.build import rendered

FOLDER = Path(__file__).resolve().parents[2] / "k8s/base/dashboards"

if __name__ == "__main__":
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {FOLDER.name}/{name}")
