"""A guard inside Ray Serve's HTTP proxies, against headers that Ray cannot decode and clients that do not read.

It also marks requests without an X-Request-Id, since Ray's proxy gives each of them one that looks like a client's.
Ray's proxy decodes the ids in a request's headers as UTF-8, and answers a bare 500 where it cannot. A proxy runs what
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names; `app.serve` and the container image name `middlewares`. It imports
little, since every proxy loads it.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.proxy_replies import proxy_reply
from app.api.proxy_routes import AwaitRoutes
from app.api.repeating import Repeating
from app.api.slow_readers import SlowReaders
from app.errors import InvalidRequestError

WITHOUT_ID = "x-flux-without-request-id"
"""The header of a request whose client sent no X-Request-Id."""


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves, the innermost first."""
    return [Middleware(AwaitRoutes), Middleware(Repeating), Middleware(SlowReaders), Middleware(ProxyGuard)]


class ProxyGuard:
    """Answers 400 to a request with a header that is no UTF-8, whichever it is; marks one without an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wrong = _undecodable(scope["headers"])
        if wrong is None:
            await self._app({**scope, "headers": _marked(scope["headers"])}, receive, send)
            return
        error = InvalidRequestError(
            f"the header {wrong} is not UTF-8; send ASCII, or leave it out", param=wrong, code="header_not_allowed"
        )
        await proxy_reply(error, scope)(scope, receive, send)


def _undecodable(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The name of the first header that is no UTF-8, by name or value; its own bytes beyond ASCII escaped."""
    for name, value in headers:
        try:
            name.decode()
            value.decode()
        except UnicodeDecodeError:
            return name.decode("ascii", "backslashreplace")
    return None


def _marked(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """``headers``, with `WITHOUT_ID` where there is no X-Request-Id."""
    if any(name == b"x-request-id" for name, _ in headers):
        return headers
    return [*headers, (WITHOUT_ID.encode(), b"1")]
