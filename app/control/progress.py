"""One image's progress events on the way to its stream: every preview, but only the latest of the others."""

import asyncio
import time

from app.messages.results import Progress

PACE_S = 0.1
"""Least time between events without a preview, however fast the steps are."""


class ProgressBuffer:
    """The unread events of one image. Without ``progress`` only the first is due, and those with a preview."""

    def __init__(self, progress: bool = True) -> None:
        self._progress = progress
        self._events: list[Progress] = []  # previews, then at most one event without
        self._pushed_s: float | None = None
        self._over = False
        self._changed = asyncio.Event()

    def is_due(self, last: bool = False) -> bool:
        """Whether an event without a preview is due: `PACE_S` after the one before, or after the ``last`` step."""
        if self._pushed_s is None:
            return True
        return self._progress and (last or time.monotonic() - self._pushed_s >= PACE_S)

    def push(self, event: Progress) -> None:
        """Add ``event``; it replaces an unread one without a preview."""
        if self._events and self._events[-1].preview is None:
            self._events.pop()
        self._events.append(event)
        self._pushed_s = time.monotonic()
        self._changed.set()

    def close(self) -> None:
        """Mark the end: no more events follow."""
        self._over = True
        self._changed.set()

    async def read(self) -> list[Progress]:
        """Wait for unread events and take them; none when no more follow."""
        while not self._events and not self._over:
            self._changed.clear()
            await self._changed.wait()
        events, self._events = self._events, []
        return events
