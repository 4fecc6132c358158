"""Requests under way in this process, so that one can be ended by its id, at whatever stage it is."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from app.api.backend import Picture
from app.api.errors import RequestCancelledError


class Flight:
    """One request and the task that works on it."""

    def __init__(self, pictures: int, work: Coroutine[Any, Any, list[Picture]]) -> None:
        self.pictures = pictures
        self.task = asyncio.create_task(work)
        # Who asked may be gone before the task fails; that is no news then.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._ended = False

    def end(self) -> None:
        """Cancel the request; whoever waits for it is told."""
        self._ended = True
        self.task.cancel()

    async def land(self) -> list[Picture]:
        """The request's pictures.

        Raises:
            RequestCancelledError: `end` was called.
        """
        try:
            return await self.task
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if self._ended and not (waiter and waiter.cancelling()):
                raise RequestCancelledError("the request was cancelled by its id") from None
            raise

    async def abandon(self) -> None:
        """Cancel the request, and return when its calls are."""
        self.task.cancel()
        await asyncio.wait({self.task})


class Flights:
    """The requests of one process by id; a client may use an id more than once."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[Flight]] = {}

    def start(self, request_id: str, pictures: int, work: Coroutine[Any, Any, list[Picture]]) -> Flight:
        """Begin ``work``, and know it until it is done."""
        flight = Flight(pictures, work)
        self._by_id.setdefault(request_id, []).append(flight)
        flight.task.add_done_callback(lambda _: self._forget(request_id, flight))
        return flight

    def end(self, request_id: str) -> int:
        """End every request with this id; returns how many pictures that were."""
        flights = [flight for flight in self._by_id.get(request_id, ()) if not flight.task.done()]
        for flight in flights:
            flight.end()
        return sum(flight.pictures for flight in flights)

    def _forget(self, request_id: str, flight: Flight) -> None:
        self._by_id[request_id].remove(flight)
        if not self._by_id[request_id]:
            del self._by_id[request_id]
