"""Which files hold a component's weights: one, or those of an index, under their plain names or those of a variant.

A variant is diffusers' word for the same weights in another precision, a part of the name: ``model.bf16.safetensors``,
``model.safetensors.index.bf16.json``.
"""

from __future__ import annotations

import re
from pathlib import Path

from app.engine.checkpoint_files import CheckpointError, read_json, refuse_foreign
from app.engine.foreign_files import SAFETENSORS_ONLY

WEIGHTS = "diffusion_pytorch_model"
"""How the names of diffusers' weight files begin."""
ENCODER_WEIGHTS = "model"
"""How the names of transformers' weight files begin."""

_SHARD = re.compile(r"-\d+-of-\d+\.")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload", ".download", ".tmp")


def weight_files(folder: Path, stem: str = WEIGHTS) -> list[Path]:
    """The safetensors files of the component in ``folder``; those of a variant where there are no others.

    Raises:
        CheckpointError: a file is missing, with what is there instead; or several variants are there.
    """
    index, single = _names(folder, stem, weight_variant(folder, stem))
    if not (index.exists() or index.is_symlink()):
        return [_present(single, "")]
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{index} has no weight_map of tensors and files beside it: download it again")
    return [_present(folder / name, f", and {index.name} names it") for name in sorted(names)]


def weight_variant(folder: Path, stem: str = WEIGHTS) -> str | None:
    """The variant in whose files the weights are, None where they have their plain names (or are not there).

    Raises:
        CheckpointError: there are several variants and no plain names.
    """
    if any(path.exists() for path in _names(folder, stem, None)):
        return None
    name = re.compile(rf"{re.escape(stem)}(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)")
    found = sorted({hit[1] or hit[2] for path in folder.glob(f"{stem}.*") if (hit := name.fullmatch(path.name))})
    if len(found) > 1:
        raise CheckpointError(f"{folder} has the variants {', '.join(found)} of {stem}: keep the files of one of them")
    return found[0] if found else None


def encoder_variant(model: Path) -> str | None:
    """The variant of the text encoders of ``model``, None where all have plain names.

    Raises:
        CheckpointError: they are of different variants; their pipeline loads one.
    """
    folders = sorted(model.glob("text_encoder*"))
    found = {variant for folder in folders if (variant := weight_variant(folder, ENCODER_WEIGHTS))}
    if len(found) > 1:
        raise CheckpointError(f"{model}: the text encoders are of the variants {', '.join(sorted(found))}: use one")
    return next(iter(found), None)


def _names(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    part = f".{variant}" if variant else ""
    return folder / f"{stem}.safetensors.index{part}.json", folder / f"{stem}{part}.safetensors"


def _present(file: Path, why: str) -> Path:
    if file.is_file():
        return file
    refuse_foreign(file)
    raise CheckpointError(f"{file} is missing{why}{_instead(file)}")


def _instead(file: Path) -> str:
    """What stands in place of a missing ``file``, with the remedy."""
    names = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []

    def first(*suffixes: str) -> str | None:
        return next((name for name in names if name.endswith(suffixes)), None)

    if name := first(*_UNFINISHED):
        return f" ({name} is an unfinished download: let it finish)"
    if name := first(*_PICKLES):
        return f" ({name} is a pickle and is refused: convert it to safetensors)"
    if name := first(".gguf"):
        return f" ({name} is a GGUF file; {SAFETENSORS_ONLY})"
    if _SHARD.search(file.name):
        return ": download it"
    if name := first(".safetensors"):
        if _SHARD.search(name):
            return f" ({name} is one of several files, and their index is missing: download it)"
        if file.name.startswith(WEIGHTS):
            return f" (there is {name}: one file in BFL's layout goes into the setting `transformer`)"
        return f" (there is {name}: if it holds the same tensors, rename it)"
    return ""
