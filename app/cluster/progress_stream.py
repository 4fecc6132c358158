"""An image's news from its coordinator, for as long as the image is being made."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import replace
from typing import Any, TypeVar

import ray

from app.errors import GroupFailedError
from app.messages import Progress

T = TypeVar("T")


class ProgressFilter:
    """Which news are passed on: all of them with ``progress``, else the first and each preview; no preview twice."""

    def __init__(self, progress: bool) -> None:
        self._progress = progress
        self._begun = False
        self._previews_made = 0
        self._previews_sent = 0

    def begin(self) -> None:
        """The image is made from its first step on, perhaps not for the first time."""
        self._previews_made = 0

    def of(self, news: list[Progress]) -> tuple[Progress, ...]:
        """Those of ``news`` to pass on."""
        selected = []
        for event in news:
            if event.preview is not None:
                self._previews_made += 1
                if self._previews_made <= self._previews_sent:
                    event = replace(event, preview=None)
            if self._progress or not self._begun or event.preview is not None:
                selected.append(event)
            self._begun = True
        self._previews_sent = max(self._previews_sent, self._previews_made)
        return tuple(selected)


async def result_or_none(end: "asyncio.Future[Any]", awaited: Awaitable[T]) -> T | None:
    """What ``awaited`` gives, or None when ``end`` is done before."""
    task = asyncio.ensure_future(_result(awaited))
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()


async def _result(awaited: Awaitable[T]) -> T:
    return await awaited  # an ObjectRef is no future that asyncio knows


async def poll_progress(
    coordinator: Any, row_id: str, image: "asyncio.Future[Any]"
) -> AsyncGenerator[list[Progress], None]:
    """The row's events until it is over, its group broke, or ``image`` is done; see `Coordinator.events`."""
    seen = 0
    while seen >= 0:
        call: Awaitable[tuple[list[Progress], int]] = coordinator.events.remote(row_id, seen)
        try:
            answer = await result_or_none(image, call)
        except (GroupFailedError, ray.exceptions.RayActorError):
            return  # whoever makes the image hears of it, too, and asks another group
        if answer is None:
            return
        news, seen = answer
        if news:
            yield news
