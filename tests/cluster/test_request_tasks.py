"""Requests are ended by their id."""

from __future__ import annotations

import asyncio

import pytest

from app.api.backend import GeneratedImage
from app.cluster.request_tasks import RequestRegistry
from app.errors import RequestCancelledError


async def forever() -> list[GeneratedImage]:
    await asyncio.Event().wait()
    return []


async def test_a_flight_is_ended_by_its_id() -> None:
    tasks = RequestRegistry()
    mine = [tasks.start("mine", images, forever()) for images in (2, 1)]
    others = tasks.start("others", 1, forever())
    assert tasks.cancel("nobody") == (0, 0)
    assert tasks.cancel("mine") == (3, 0)
    for task in mine:
        with pytest.raises(RequestCancelledError):
            await task.result()
    assert tasks.cancel("mine") == (0, 0)
    assert not others.task.done()
    await others.cancel_and_wait()
    assert tasks._by_id == {}


async def test_a_waiter_that_is_cancelled_itself_takes_the_flight_along() -> None:
    tasks = RequestRegistry()
    task = tasks.start("mine", 1, forever())
    waiter = asyncio.create_task(task.result())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert task.task.cancelled()
