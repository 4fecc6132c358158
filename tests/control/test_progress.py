from __future__ import annotations

import asyncio

import pytest
import torch

from app.control import progress
from app.control.progress import ProgressBuffer
from app.messages.results import Progress


def event(step: int, preview: bool = False) -> Progress:
    return Progress(0, step, 9, "C", 1.0, 0, torch.zeros(1) if preview else None)


async def read(buffer: ProgressBuffer) -> list[int]:
    return [one.step for one in await asyncio.wait_for(buffer.read(), 10)]


async def test_every_preview_and_the_latest_progress() -> None:
    buffer = ProgressBuffer()
    for step, preview in [(0, False), (1, False), (2, True), (3, False), (4, False), (5, True), (6, False)]:
        buffer.push(event(step, preview))
    assert await read(buffer) == [2, 5, 6]
    buffer.push(event(7))
    assert await read(buffer) == [7]


async def test_reading_waits_for_events() -> None:
    buffer = ProgressBuffer()
    reading = asyncio.create_task(read(buffer))
    await asyncio.sleep(0)
    assert not reading.done()
    buffer.push(event(1))
    assert await reading == [1]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(buffer.read(), 0.01)


async def test_events_before_the_end_are_still_read() -> None:
    buffer = ProgressBuffer()
    buffer.push(event(8, preview=True))
    buffer.push(event(9))
    buffer.close()
    assert await read(buffer) == [8, 9]
    assert await read(buffer) == []


@pytest.mark.parametrize(
    ("steps", "pace_s", "due"),
    [(True, 0.0, (True, True)), (True, 3600.0, (False, True)), (False, 0.0, (False, False))],
)
async def test_events_are_due(monkeypatch: pytest.MonkeyPatch, steps: bool, pace_s: float, due: tuple) -> None:
    """The first always; then at the pace and after the last step, or not at all where only previews are wanted."""
    monkeypatch.setattr(progress, "PACE_S", pace_s)
    buffer = ProgressBuffer(steps)
    assert buffer.is_due()
    buffer.push(event(0))
    assert (buffer.is_due(), buffer.is_due(last=True)) == due
