"""Low-rank adapters: those that a folder offers, and those that a row has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class LoraUse:
    """One low-rank adapter that a row's transformer has, ``scale`` times; 0 leaves it out, and it may be negative.

    Attributes:
        name: of its file in the folder of adapters, without ``.safetensors``.
        digest: of that file's content (`app.engine.lora_files.lora_digest`), which ranks compare; empty for any.
        nbytes: the memory that it takes on a rank at most.
    """

    name: str
    scale: float
    digest: str = ""
    nbytes: int = 0

    @property
    def content(self) -> tuple[str, str]:
        """Name and digest: a file that is replaced under the same name is another adapter."""
        return self.name, self.digest


@dataclass(frozen=True)
class LoraFile:
    """An adapter of the folder that the setting ``loras`` names.

    Attributes:
        name: its path in the folder without the suffix.
        digest: of the file's content.
        rank: the largest of its matrices' ranks.
        nbytes: the memory that it takes on a rank at most.
    """

    name: str
    digest: str
    rank: int
    nbytes: int


@dataclass(frozen=True)
class LoraListing:
    """The adapters that a folder offers, by name, and the files in it that are refused, with the reason."""

    offered: Mapping[str, LoraFile] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
