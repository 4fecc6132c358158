"""A picture's news from its coordinator, for as long as the picture is being made."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import ray

from app.engine.messages import ProgressEvent
from app.serving.errors import GroupFailedError

T = TypeVar("T")


async def until(end: "asyncio.Future[Any]", awaited: Awaitable[T]) -> T | None:
    """What ``awaited`` gives, or None when ``end`` is done before."""
    task = asyncio.ensure_future(_result(awaited))
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()


async def _result(awaited: Awaitable[T]) -> T:
    return await awaited  # an ObjectRef is no future that asyncio knows


async def news_of(
    coordinator: Any, row_id: str, picture: "asyncio.Future[Any]"
) -> AsyncGenerator[list[ProgressEvent], None]:
    """The row's events until it is over, its group broke, or ``picture`` is done; see `Coordinator.events`."""
    seen = 0
    while seen >= 0:
        call: Awaitable[tuple[list[ProgressEvent], int]] = coordinator.events.remote(row_id, seen)
        try:
            answer = await until(picture, call)
        except (GroupFailedError, ray.exceptions.RayActorError):
            return  # whoever makes the picture hears of it, too, and asks another group
        if answer is None:
            return
        news, seen = answer
        if news:
            yield news
