"""Stopping without loss: from one moment on new requests for images are refused, and those under way finish."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware import asks_for_images
from app.api.replies import error_response
from app.errors import UnavailableError


class Drain:
    """Whether this process still takes requests for images, and how many it works on."""

    def __init__(self, seconds: float) -> None:
        """``seconds`` is the time that requests under way have from `begin` on."""
        self.under_way = 0
        self._seconds = seconds
        self._until_s: float | None = None

    def begin(self) -> None:
        """Take no more requests; harmless when that is so already."""
        if self._until_s is None:
            self._until_s = time.monotonic() + self._seconds

    @property
    def begun(self) -> bool:
        """Whether new requests are refused."""
        return self._until_s is not None

    @property
    def waits_for(self) -> int:
        """Requests under way for which the process should stay; 0 when their time is over."""
        return self.under_way if self._until_s is None or time.monotonic() < self._until_s else 0


class DrainMiddleware:
    """Counts the requests for images, and refuses new ones once the drain has begun."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or not asks_for_images(scope):
            await self._app(scope, receive, send)
        elif self._drain.begun:
            error = UnavailableError("the service is stopping; ask again")
            scope["state"]["error_code"] = error.code
            await error_response(error)(scope, receive, send)
        else:
            self._drain.under_way += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._drain.under_way -= 1
