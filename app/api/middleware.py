"""ASGI middleware: request id, access log, metrics, and a JSON 500 for unhandled exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.replies import error_response
from app.api.request_ids import sane_request_id
from app.errors import ServiceError
from app.metrics import ApiMetrics
from app.telemetry import REQUEST_ID, Tracing

logger = logging.getLogger(__name__)

IMAGES_PATH = "/v1/images/generations"
EDITS_PATH = "/v1/images/edits"
# nginx's status for a client that left before the answer; no such reply is ever sent.
CLIENT_CLOSED_REQUEST = 499
CLIENT_LEFT = "client_left"  # its error code, which only metrics get to see
_OTHER_PATHS = re.compile(r"(?:/openai(?:/v1|/deployments/(?P<model>.+?))?)?(?P<route>/images/(?:generations|edits))")


def outcome(status: int) -> str:
    """The metric's outcome of a request that ended with ``status``."""
    special = {CLIENT_CLOSED_REQUEST: "cancelled", 409: "cancelled", 429: "busy", 503: "unavailable"}
    return special.get(status) or ("ok" if status < 400 else "invalid" if status < 500 else "failed")


class RequestMiddleware:
    """Pure ASGI, so that a cancelled request reaches the handler as a cancellation.

    Args:
        id_added_in_front: the server in front (Ray Serve's proxy) adds the request's own X-Request-Id to every reply,
            so it is added here only when it differs.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, tracing: Tracing, id_added_in_front: bool) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.id_added_in_front = id_added_in_front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, deployment = _route(scope)
        scope = {**scope, "path": path}
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        request_id = sane_request_id(given)
        scope.setdefault("state", {}).update(request_id=request_id, deployment=deployment)
        with self._traced(scope, headers, request_id) as ended:
            ended(await self._serve(scope, receive, send, given))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, given: str | None) -> int:
        """Serve one request whose id is known; returns the status that it ended with."""
        request_id: str = scope["state"]["request_id"]
        started = time.perf_counter()
        status = 0  # until the reply's start is sent
        head = scope["method"] == "HEAD"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (self.id_added_in_front and given == request_id):
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app({**scope, "method": "GET"} if head else scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # half a reply is out: only breaking the connection tells the client
            error = ServiceError(f"internal error; quote request id {request_id} to the operator")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            # A stream that fails has sent its status long before.
            status = scope["state"].get("failed_with", status) if status < 400 else status
            status = status or 500
            self._record(scope, request_id, status, time.perf_counter() - started)
        return status

    @contextlib.contextmanager
    def _traced(self, scope: Scope, headers: Headers, request_id: str) -> Iterator[Callable[[int], None]]:
        """The request's id in every log line, and a span around a request for images."""
        token = REQUEST_ID.set(request_id)
        try:
            if not asks_for_images(scope):
                yield lambda status: None
                return
            with self.tracing.request(path_of(scope), headers, {"flux.request_id": request_id}) as ended:
                yield ended
        finally:
            REQUEST_ID.reset(token)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        method, path = scope["method"], path_of(scope)
        # Probes and scrapes come every few seconds for ever: not worth a line each unless they fail.
        level = logging.DEBUG if method in ("GET", "HEAD") and status < 400 else logging.INFO
        key_name = scope["state"].get("key_name", "")
        by = f" by {key_name!r}" if key_name else ""
        logger.log(level, "request %s%s: %s %.200r -> %d in %.3f s", request_id, by, method, path, status, seconds)
        if asks_for_images(scope):
            code = scope["state"].get("error_code")
            if status == CLIENT_CLOSED_REQUEST:
                code = CLIENT_LEFT
            elif status >= 500 and code is None:
                code = ServiceError.code
            loras = scope["state"].get("loras", ())
            self.metrics.observe_request(
                outcome(status), status, seconds, code=code, request_id=request_id, key_name=key_name, loras=loras
            )


def _route(scope: Scope) -> tuple[str, str | None]:
    """The path that the routes know, and the model that Azure's form of it names.

    Doubled slashes and one at the end, which base URLs that end with a slash bring, are left out. Azure's clients and
    those of LiteLLM's proxy send `/openai/deployments/MODEL/images/...`, `/openai/v1/images/...` or `/images/...`.
    """
    path = re.sub("/{2,}", "/", path_of(scope)).removesuffix("/") or "/"
    other = _OTHER_PATHS.fullmatch(path)
    path = f"/v1{other['route']}" if other else path
    return f"{scope.get('root_path', '')}{path}", other["model"] if other else None


def path_of(scope: Scope) -> str:
    """The path of a request, without the route prefix that it begins with."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def asks_for_images(scope: Scope) -> bool:
    """Whether a request wants images made or edited."""
    return scope["method"] == "POST" and path_of(scope) in (IMAGES_PATH, EDITS_PATH)
