"""The folder of low-rank adapters (LoRA): where it is, and what it offers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from app.messages.loras import LoraFile, LoraListing
from app.model_files import REPOSITORY, model_folder
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.lora_names import Target

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 200
_SUFFIX = ".safetensors"
_OTHER_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def lora_folder(settings: Settings) -> Path | None:
    """The folder that the setting ``loras`` names (from the working directory or the repository); None without it.

    Raises:
        FileNotFoundError: it is not on this node.
    """
    if settings.loras is None:
        return None
    candidates = [Path(settings.loras).expanduser(), REPOSITORY / settings.loras]
    for folder in candidates:
        if folder.is_dir():
            return folder.absolute()
    raise FileNotFoundError(
        f"loras {settings.loras!r}: there is no folder {candidates[0].absolute()} on this node; mount it on all nodes "
        "with ranks, or leave the setting out"
    )


def lora_targets(settings: Settings) -> dict[str, Target]:
    """What adapters may change in the served model's transformer, from its configuration.

    This reads diffusers, which a rank has read anyway.
    """
    from app.engine.loading import meta_transformer
    from app.engine.lora_names import targets

    return targets(meta_transformer(model_folder(settings) / "transformer"))


def read_listing(settings: Settings, known: Mapping[str, Target]) -> LoraListing:
    """What the folder offers for the served model; the log has the files that are refused, with the reason.

    Args:
        known: the model's `lora_targets`.

    Raises:
        FileNotFoundError: it is not on this node.
    """
    folder = lora_folder(settings)
    if folder is None:
        return LoraListing()
    bytes_each = getattr(torch, settings.dtype).itemsize
    listing = scan(folder, known, bytes_each, settings.loras_bytes)
    for name, reason in listing.refused.items():
        logger.warning("adapter %s is not offered: %s", name, reason)
    logger.info("%d adapter(s) in %s: %s", len(listing.offered), folder, ", ".join(listing.offered) or "none")
    return listing


def scan(folder: Path, known: Mapping[str, Target], bytes_each: int, limit_bytes: int) -> LoraListing:
    """What ``folder`` and those below it offer. Hidden files and folders are passed over.

    Args:
        known: the model's `lora_targets`.
        bytes_each: of one weight on a rank.
        limit_bytes: memory of a rank for adapters; one that takes more is refused.
    """
    from app.engine.lora_names import LoraError

    offered: dict[str, LoraFile] = {}
    refused: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = relative.as_posix().removesuffix(_SUFFIX)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if not name.isprintable() or len(name) > MAX_NAME_CHARS:
            refused[ascii(name)] = f"name it with at most {MAX_NAME_CHARS} characters, all of them printable"
        elif path.suffix in _OTHER_SUFFIXES:
            refused[name] = "only safetensors files are read; convert it"
        elif path.suffix == _SUFFIX:
            try:
                offered[name] = _checked(path, name, known, bytes_each, limit_bytes)
            except (LoraError, OSError) as error:
                # Clients read this as well, and need no paths of this machine.
                refused[name] = str(error).replace(str(path), path.name)
    return LoraListing(offered, refused)


def _checked(path: Path, name: str, known: Mapping[str, Target], bytes_each: int, limit_bytes: int) -> LoraFile:
    from app.engine.lora_files import check_lora, lora_digest
    from app.engine.lora_names import LoraError

    info = check_lora(path, known)
    nbytes = info.weights * bytes_each
    if nbytes > limit_bytes:
        raise LoraError(f"{path} takes up to {nbytes} bytes on a rank, above loras_bytes, {limit_bytes}")
    return LoraFile(name, lora_digest(path), info.rank, nbytes)


def common_listing(listings: Sequence[LoraListing]) -> LoraListing:
    """What all of ``listings``, at least one, offer with the same content; the rest of the first is refused."""
    first, *others = listings
    refused = dict(first.refused)
    offered: dict[str, LoraFile] = {}
    for name, file in first.offered.items():
        if all(other.offered.get(name) == file for other in others):
            offered[name] = file
        else:
            refused[name] = "nodes find different files; mount one folder on all of them"
    return LoraListing(offered, refused)
