from __future__ import annotations

import asyncio

import pytest
import torch

from app.control.progress import END, ProgressBuffer
from app.messages import Progress


def event(step: int, preview: bool = False) -> Progress:
    return Progress(0, step, 9, "C", 1.0, 0, torch.zeros(1) if preview else None)


async def read(feed: ProgressBuffer, seen: int) -> tuple[list[int], int]:
    events, last = await asyncio.wait_for(feed.read(seen), 10)
    return [one.step for one in events], last


async def test_every_preview_and_the_latest_progress() -> None:
    feed = ProgressBuffer()
    assert feed.is_empty
    for step, preview in [(0, False), (1, False), (2, True), (3, False), (4, False), (5, True), (6, False)]:
        feed.push(event(step, preview))
    assert not feed.is_empty
    steps, last = await read(feed, 0)
    assert steps == [2, 5, 6]
    feed.push(event(7))
    assert await read(feed, last) == ([7], last + 1)


async def test_reading_waits_for_news() -> None:
    feed = ProgressBuffer()
    reading = asyncio.create_task(read(feed, 0))
    await asyncio.sleep(0)
    assert not reading.done()
    feed.push(event(1))
    steps, last = await reading
    assert steps == [1]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(feed.read(last), 0.01)


async def test_what_was_told_before_the_end_is_still_read() -> None:
    feed = ProgressBuffer()
    feed.push(event(8, preview=True))
    feed.push(event(9))
    feed.close()
    steps, last = await read(feed, 0)
    assert steps == [8, 9]
    assert await feed.read(last) == END
    assert await feed.read(0) == END, "what was seen is forgotten"
