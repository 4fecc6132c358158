"""What the settings ``model`` and ``transformer`` may have meant where they name nothing that can be served."""

from __future__ import annotations

import re
from pathlib import Path

from app.engine.foreign_files import SAFETENSORS_ONLY, foreign

INDEX = "model_index.json"
_SAFETENSORS = (".safetensors", ".sft")
_WEIGHTS = (*_SAFETENSORS, ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/.*)?")


def not_a_model(model: str, found: Path | None) -> str | None:
    """What ``model`` names, given that it is no folder with an index, and what to name instead.

    Args:
        model: the setting's value, after which the answer is read.
        found: the file or folder of that name, None when there is none.

    Returns:
        None for what may be a hub id, or a folder that is empty or not there.
    """
    if address := _HUB_ADDRESS.fullmatch(model):
        return f"is an address: write the hub id, {address[1]}"
    if found is None and Path(model).suffix in _WEIGHTS:
        return "names a single file, which is not there: download it, and give its path as `transformer`"
    if found is None:
        return None
    if found.is_file():
        return f"is a single file: {_for_a_file(found)}"
    if (found / "snapshots").is_dir():
        return f"is an entry of the hub's cache: write the hub id, or one of the folders in {found / 'snapshots'}"
    if (found.parent / INDEX).is_file():
        return f"is one part of the model in {found.parent}: name that folder"
    inside = sorted(path.name for path in found.iterdir())
    if below := [name for name in inside if (found / name / INDEX).is_file()]:
        return f"has no {INDEX}, and {found / below[0]} has one: name that folder"
    if files := [found / name for name in inside if name.endswith(_WEIGHTS)]:
        return f"has no {INDEX}, but the file {files[0].name}: {_for_a_file(files[0])}"
    return None


def not_a_transformer(path: Path) -> str | None:
    """What ``path`` is, given as ``transformer``, and what to give instead; None for a safetensors file."""
    if path.is_dir():
        return "is a folder: name one file in BFL's layout; a folder in diffusers' layout goes into that of `model`"
    if what := foreign(path):
        return what
    return None if path.suffix in _SAFETENSORS else f"is no safetensors file; {SAFETENSORS_ONLY}"


def _for_a_file(path: Path) -> str:
    if why := not_a_transformer(path):
        return f"it {why}"
    return (
        "give it as `transformer`, and as `model` the folder or hub id that has all other parts, for example "
        "black-forest-labs/FLUX.1-dev"
    )
