"""Which adapters the ranks of a group hold, which are in use, and which leave for others. Pure.

The coordinator alone decides it for all ranks, so they hold the same ones. An adapter is in use from the arrival of an
image that names it until that image has ended, so that its ranks have it whenever the image joins the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from app.messages.loras import LoraUse

Content = tuple[str, str]
"""An adapter: its name, and the digest of its file."""


@dataclass(frozen=True)
class LoraMoves:
    """What the ranks do before an image can join: first ``drop`` adapters, then ``load`` some."""

    drop: tuple[Content, ...]
    load: tuple[Content, ...]


class LoraTable:
    """The adapters of one group, those used longest ago first.

    Invariant: those that it says are held never take more than ``limit_bytes``.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[Content, int] = {}  # bytes; the least recently used first
        self._users: Counter[Content] = Counter()

    @property
    def nbytes(self) -> int:
        """Memory of all that are held, on a rank at most."""
        return sum(self._held.values())

    def has_room(self, uses: Iterable[LoraUse]) -> bool:
        """Whether ``uses`` fit beside all that are in use."""
        sizes = {content: nbytes for content, nbytes in self._held.items() if self._users[content]}
        sizes |= {use.content: use.nbytes for use in uses}
        return sum(sizes.values()) <= self._limit_bytes

    def hold(self, uses: Iterable[LoraUse]) -> LoraMoves:
        """Count ``uses``, which have room, as in use, and say what the ranks have to do for them."""
        uses = list(uses)
        load = tuple(use.content for use in uses if use.content not in self._held)
        for use in uses:
            self._users[use.content] += 1
            self._held.pop(use.content, None)
            self._held[use.content] = use.nbytes
        drop: list[Content] = []
        for content in [one for one in self._held if not self._users[one]]:
            if self.nbytes <= self._limit_bytes:
                break
            del self._held[content]
            drop.append(content)
        return LoraMoves(tuple(drop), load)

    def release(self, uses: Iterable[LoraUse]) -> None:
        """The image that held ``uses`` has ended; its adapters stay until others need their room."""
        self._users.subtract(use.content for use in uses)
        self._users += Counter()  # leaves out those at 0

    def forget(self, content: Content) -> None:
        """The ranks do not hold ``content`` after all, since it could not be loaded."""
        self._held.pop(content, None)
