"""A group's start is given up when a part of it makes no progress; slow is not hanging as long as bytes move."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from app.errors import GroupFailedError

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


async def loaded(reports: AsyncIterator[Any], timeout_s: float, doing: str) -> None:
    """Return when ``reports`` (calls that give the bytes moved so far) end, however long that takes while bytes move.

    Raises:
        GroupFailedError: fewer than `PROGRESS_BYTES` moved, or no report came, for ``timeout_s``.
    """
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
        if moved - seen >= PROGRESS_BYTES:
            seen, progressed_s = moved, time.monotonic()
