"""A group's start is given up when a part of it makes no progress; slow is not hanging as long as bytes move."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from app.engine.weight_files import weight_files
from app.errors import GroupFailedError
from app.messages.results import GroupStart
from app.model_files import model_folder, transformer_file
from app.settings import Settings

PROGRESS_BYTES = 1 << 20
"""Fewer bytes are no progress: a process that hangs still wakes its threads up through descriptors."""

T = TypeVar("T")


async def in_time(call: Awaitable[T], timeout_s: float, doing: str) -> T:
    """The result of ``call``.

    Raises:
        GroupFailedError: there is none after ``timeout_s``; ``doing`` says of what.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        raise GroupFailedError(f"{doing}: no progress for start_timeout_s, {timeout_s:g} s") from None


async def loaded(
    reports: AsyncIterator[Any], timeout_s: float, doing: str, tell: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Return when ``reports`` (calls that give the bytes moved so far) end, however long that takes while bytes move.

    Args:
        tell: called with the bytes that moved since the first report.

    Raises:
        GroupFailedError: fewer than `PROGRESS_BYTES` moved, or no report came, for ``timeout_s``.
    """
    first: int | None = None
    seen, progressed_s = 0, time.monotonic()
    while True:
        left_s = max(progressed_s + timeout_s - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(left_s):
                moved: int = await (await anext(reports))
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise GroupFailedError(f"{doing}: no progress for start_timeout_s, {timeout_s:g} s") from None
        first = moved if first is None else first
        tell(moved - first)
        if moved - seen >= PROGRESS_BYTES:
            seen, progressed_s = moved, time.monotonic()


class StartReports:
    """Tells a group's coordinator, whom ``/health`` asks, how far the group's start is; waits for no answer."""

    def __init__(self, coordinator: Any, replica: str, ranks: int) -> None:
        self._coordinator = coordinator
        self._start = GroupStart(replica, "", (0,) * ranks)

    def enter(self, phase: str, checkpoint_bytes: int = 0) -> None:
        """The group begins with ``phase``."""
        self._tell(replace(self._start, phase=phase, checkpoint_bytes=checkpoint_bytes or self._start.checkpoint_bytes))

    def read(self, rank: int, nbytes: int) -> None:
        """So many bytes ``rank`` has read."""
        before = self._start.read_bytes
        self._tell(replace(self._start, read_bytes=(*before[:rank], nbytes, *before[rank + 1 :])))

    def _tell(self, start: GroupStart) -> None:
        self._start = start
        self._coordinator.report_start.remote(start)


def checkpoint_bytes(settings: Settings) -> int:
    """The size of the transformer's weight files on this node."""
    single_file = transformer_file(settings)
    files = [single_file] if single_file else weight_files(model_folder(settings) / "transformer")
    return sum(file.stat().st_size for file in files)
