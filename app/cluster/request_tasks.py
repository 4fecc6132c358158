"""Requests under way in this process, so that one can be ended by its id, at whatever stage it is."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from app.api.backend import GeneratedImage
from app.errors import RequestCancelledError


class RequestTask:
    """One request and the task that works on it."""

    def __init__(self, images: int, work: Coroutine[Any, Any, list[GeneratedImage]], key_name: str = "") -> None:
        self.images = images
        self.key_name = key_name
        self.task = asyncio.create_task(work)
        # Retrieved, so that asyncio does not warn when the client left before the task failed.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._ended = False

    def cancel(self) -> None:
        """Cancel the request; `result` then raises `RequestCancelledError`."""
        self._ended = True
        self.task.cancel()

    async def result(self) -> list[GeneratedImage]:
        """The request's images.

        Raises:
            RequestCancelledError: `cancel` was called.
        """
        try:
            return await self.task
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if self._ended and not (waiter and waiter.cancelling()):
                raise RequestCancelledError("the request was cancelled by its id") from None
            raise

    async def cancel_and_wait(self) -> None:
        """Cancel the request, and return when its calls are."""
        self.task.cancel()
        await asyncio.wait({self.task})


class RequestRegistry:
    """The requests of one process by id; a client may use an id more than once."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[RequestTask]] = {}

    def start(
        self, request_id: str, images: int, work: Coroutine[Any, Any, list[GeneratedImage]], key_name: str = ""
    ) -> RequestTask:
        """Begin ``work``, and know it until it is done."""
        task = RequestTask(images, work, key_name)
        self._by_id.setdefault(request_id, []).append(task)
        task.task.add_done_callback(lambda _: self._forget(request_id, task))
        return task

    def cancel(self, request_id: str, key_name: str = "") -> tuple[int, int]:
        """End every request with this id and key; returns how many images that were, and how many have other keys."""
        tasks = [task for task in self._by_id.get(request_id, ()) if not task.task.done()]
        own = [task for task in tasks if task.key_name == key_name]
        for task in own:
            task.cancel()
        ended = sum(task.images for task in own)
        return ended, sum(task.images for task in tasks) - ended

    def _forget(self, request_id: str, task: RequestTask) -> None:
        self._by_id[request_id].remove(task)
        if not self._by_id[request_id]:
            del self._by_id[request_id]
