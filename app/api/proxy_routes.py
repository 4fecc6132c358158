"""ASGI middleware inside Ray Serve's HTTP proxies: a proxy that has just started waits for its routes.

Ray's proxy listens before its controller has told it the applications, and answers 404 to everything in between.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.proxy_replies import proxy_reply
from app.errors import UnavailableError

BETWEEN_TRIES_S = 0.1


class AwaitRoutes:
    """Until a first request finds its application, asks again for ``patience_s`` before it answers 503."""

    def __init__(self, app: ASGIApp, patience_s: float = 5.0) -> None:
        self._app = app
        self._patience_s = patience_s
        self._has_routes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._has_routes or scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own
            await self._app(scope, receive, send)
            return
        until, unknown = time.monotonic() + self._patience_s, False

        async def send_if_known(message: Message) -> None:
            nonlocal unknown
            if message["type"] == "http.response.start":
                unknown = _is_rays_404(message)
                self._has_routes |= not unknown
            if not unknown:
                await send(message)

        await self._app(scope, receive, send_if_known)
        while unknown and time.monotonic() < until:
            await asyncio.sleep(BETWEEN_TRIES_S)
            await self._app(scope, receive, send_if_known)  # whole: Ray reads no body before it has a route
        if unknown:
            error = UnavailableError("no application is served at this path yet; ask again", retry_after_s=1.0)
            await proxy_reply(error, scope)(scope, receive, send)


def _is_rays_404(message: Message) -> bool:
    """Whether a reply begins as that of a proxy that knows no route; the API's own have JSON."""
    headers = Headers(raw=[(bytes(name), bytes(value)) for name, value in message.get("headers", [])])
    return message["status"] == 404 and headers.get("content-type", "").startswith("text/plain")
