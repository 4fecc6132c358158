"""What those who watch an image are told: every preview, and of the rest the latest."""

import asyncio
import time

from app.messages import Progress

PACE_S = 0.1
"""Progress without a preview is told no more often, however fast the steps are."""

ProgressBatch = tuple[list[Progress], int]
END: ProgressBatch = ([], -1)


class ProgressBuffer:
    """The news of one image, numbered from 1; read by polling with the last number seen."""

    def __init__(self) -> None:
        self._news: list[tuple[int, Progress]] = []  # all previews, and at the end at most one event without
        self._last = 0
        self._told_s = 0.0
        self._over = False
        self._changed = asyncio.Event()

    @property
    def due(self) -> bool:
        """Whether it is time to tell of progress again."""
        return time.monotonic() - self._told_s >= PACE_S

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever told."""
        return self._last == 0

    def push(self, event: Progress) -> None:
        """Add ``event``; an unread one without a preview before it is out of date and goes."""
        if self._news and self._news[-1][1].preview is None:
            self._news.pop()
        self._last += 1
        self._news.append((self._last, event))
        self._told_s = time.monotonic()
        self._changed.set()

    def close(self) -> None:
        """Say that nothing more comes."""
        self._over = True
        self._changed.set()

    async def read(self, seen: int) -> ProgressBatch:
        """Wait for news beyond ``seen``; `END` when there will be none. What was seen is forgotten."""
        while self._last <= seen and not self._over:
            self._changed.clear()
            await self._changed.wait()
        self._news = [news for news in self._news if news[0] > seen]
        return ([event for _, event in self._news], self._last) if self._news else END
