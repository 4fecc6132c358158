"""Server-sent events over HTTP: a real status before the first byte, signs of life, and an end that ends the work.

sse-starlette (3.7) would not make this shorter: it pings at fixed intervals instead of after a silence, begins the
reply before the first item is there, and ends the generator within a cancelled scope, as Starlette does; what this
module has is what would remain beside it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.backend import GeneratedImage, StreamItem
from app.api.events import HEARTBEAT, Kind, error_event, event_of
from app.api.resolve import ResolvedRequest
from app.errors import ServiceError
from app.messages import Progress

logger = logging.getLogger(__name__)


class HeartbeatIterator:
    """The items of a generator, with a word when none comes for a while. A wait cut short loses no item."""

    def __init__(self, items: AsyncGenerator[StreamItem, None], patience_s: float) -> None:
        self._items = items
        self._patience_s = patience_s
        self._next: asyncio.Task[StreamItem] | None = None

    async def next(self) -> StreamItem | None:
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
    resolved: ResolvedRequest,
    items: AsyncGenerator[StreamItem, None],
    heartbeat_s: float,
    observe: Callable[[GeneratedImage], None],
    kind: Kind = "image_generation",
) -> Response:
    """Answer with ``items`` as events, once the first of them has shown that the request is taken.

    Args:
        heartbeat_s: silence after which a comment is sent; the reply begins after it at the latest.
        observe: called with each finished image.

    Raises:
        ServiceError: the request failed before anything was sent; it gets a status like any other.
    """
    paced = HeartbeatIterator(items, heartbeat_s)
    try:
        first = await paced.next()
    except BaseException:
        await paced.aclose()
        raise
    return EventStream(_events(request, resolved, paced, first, observe, kind), paced, _headers(resolved, first))


class EventStream(StreamingResponse):
    """Sends events until they end, or until the client is gone, which ends them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: HeartbeatIterator, headers: dict[str, str]) -> None:
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
    resolved: ResolvedRequest,
    paced: HeartbeatIterator,
    item: StreamItem | None,
    observe: Callable[[GeneratedImage], None],
    kind: Kind,
) -> AsyncGenerator[bytes, None]:
    try:
        while True:
            if isinstance(item, GeneratedImage):
                observe(item)
            event = HEARTBEAT if item is None else event_of(resolved, item, kind)
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


def _headers(resolved: ResolvedRequest, first: StreamItem | None) -> dict[str, str]:
    """What is known when the reply begins; it has proxies pass the events on at once."""
    headers = {
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
        "X-Size": resolved.size,
        "X-Seed": ", ".join(str(resolved.job.seed + index) for index in range(resolved.job.n)),
        "X-MagCache-Enabled": str(resolved.job.magcache.enabled).lower(),
    }
    if isinstance(first, Progress):
        headers |= {"X-Eta-Seconds": f"{first.eta_s:.3f}", "X-Queue-Position": str(first.queue_position)}
    if resolved.warnings:
        headers["X-Warnings"] = "; ".join(resolved.warnings)
    return headers
