"""Server-sent events over HTTP: a real status before the first byte, signs of life, and an end that ends the work.

sse-starlette (3.7) would not make this shorter: it pings at fixed intervals instead of after a silence, begins the
reply before the first item is there, and ends the generator within a cancelled scope, as Starlette does; what this
module has is what would remain beside it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Generic, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.events import HEARTBEAT, error_event
from app.errors import ServiceError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_PASSED_ON_AT_ONCE: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that have proxies pass the events on as they come."""


class HeartbeatIterator(Generic[Item]):
    """The items of a generator, with a word when none comes for a while. A wait cut short loses no item."""

    def __init__(self, items: AsyncGenerator[Item, None], patience_s: float) -> None:
        self._items = items
        self._patience_s = patience_s
        self._next: asyncio.Task[Item] | None = None

    async def next(self) -> Item | None:
        """The next item, or None when it takes longer than the patience lasts.

        Raises:
            StopAsyncIteration: there are no more.
        """
        if self._next is None:
            self._next = asyncio.create_task(anext(self._items))
        await asyncio.wait({self._next}, timeout=self._patience_s)
        if not self._next.done():
            return None
        done, self._next = self._next, None
        return done.result()

    async def aclose(self) -> None:
        """End the generator, wherever it is."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait({self._next})
        await self._items.aclose()


async def stream_response(
    request: Request,
    items: AsyncGenerator[Item, None],
    heartbeat_s: float,
    event_of: Callable[[Item], bytes | None],
    headers_of: Callable[[Item | None], Mapping[str, str]] = lambda _: {},
) -> Response:
    """Answer with ``items`` as events, once the first of them has shown that the request is taken.

    Args:
        heartbeat_s: silence after which a comment is sent; the reply begins after it at the latest.
        event_of: called with each item, in order: its event, or None for an item that is not sent.
        headers_of: the reply's own headers, by its first item, or None where that takes longer.

    Raises:
        ServiceError: the request failed before anything was sent; it gets a status like any other.
    """
    paced = HeartbeatIterator(items, heartbeat_s)
    try:
        first = await paced.next()
    except BaseException:
        await paced.aclose()
        raise
    return EventStream(_events(request, paced, first, event_of), paced, {**_PASSED_ON_AT_ONCE, **headers_of(first)})


class EventStream(StreamingResponse):
    """Sends events until they end, or until the client is gone, which ends them."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: HeartbeatIterator[Item], headers: dict[str, str]
    ) -> None:
        super().__init__(self._counted(events), headers=headers)
        self._source = source
        self._complete = False

    async def _counted(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for event in events:
            yield event
        self._complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the reply; its source is closed in any case, and so the work behind it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Here and not in the generator: Starlette ends that within a scope that cuts every await short.
            await self._source.aclose()
        if not self._complete:
            raise ClientDisconnect


async def _events(
    request: Request,
    paced: HeartbeatIterator[Item],
    item: Item | None,
    event_of: Callable[[Item], bytes | None],
) -> AsyncGenerator[bytes, None]:
    try:
        while True:
            event = HEARTBEAT if item is None else event_of(item)
            if event is not None:
                yield event
            item = await paced.next()
    except StopAsyncIteration:
        pass
    except ServiceError as error:
        yield _record_failure(request, error)
    except Exception:
        request_id = request.state.request_id
        logger.exception("request %s failed in its stream", request_id)
        yield _record_failure(request, ServiceError(f"internal error; quote request id {request_id} to the operator"))


def _record_failure(request: Request, error: ServiceError) -> bytes:
    # The reply's status went out as 200; logs and metrics get the one that fits.
    request.state.failed_with, request.state.error_code = error.status, error.code
    return error_event(error)
