"""A copy of the shipped model to damage, and changes to its configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.local_group import MODEL

WEIGHTS = "diffusion_pytorch_model.safetensors"


def copy_of_flux_tiny(to: Path) -> Path:
    """flux-tiny in the new folder ``to``."""
    return Path(shutil.copytree(MODEL, to, ignore=shutil.ignore_patterns("*.png", "*.md")))


def edit(path: Path, **values: object) -> None:
    """Set ``values`` in the JSON object of a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
