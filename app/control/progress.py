"""One image's progress events: every preview, but only the latest of the others."""

import asyncio
import time

from app.messages import Progress

PACE_S = 0.1
"""Least time between events without a preview, however fast the steps are."""

ProgressBatch = tuple[list[Progress], int]
END: ProgressBatch = ([], -1)


class ProgressBuffer:
    """The events of one image, numbered from 1; read by polling with the last number seen."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Progress]] = []  # previews, then at most one event without
        self._last = 0
        self._pushed_s = 0.0
        self._over = False
        self._changed = asyncio.Event()

    @property
    def due(self) -> bool:
        """Whether `PACE_S` has passed since the last event."""
        return time.monotonic() - self._pushed_s >= PACE_S

    @property
    def is_empty(self) -> bool:
        """Whether there was no event yet."""
        return self._last == 0

    def push(self, event: Progress) -> None:
        """Add ``event``; it replaces an unread one without a preview."""
        if self._events and self._events[-1][1].preview is None:
            self._events.pop()
        self._last += 1
        self._events.append((self._last, event))
        self._pushed_s = time.monotonic()
        self._changed.set()

    def close(self) -> None:
        """Mark the end: no more events follow."""
        self._over = True
        self._changed.set()

    async def read(self, seen: int) -> ProgressBatch:
        """Wait for events after number ``seen``, and forget those up to it; `END` when no more follow."""
        while self._last <= seen and not self._over:
            self._changed.clear()
            await self._changed.wait()
        self._events = [event for event in self._events if event[0] > seen]
        return ([event for _, event in self._events], self._last) if self._events else END
