"""ASGI middleware: access by API key, and headers that only operators may send."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.keys import ApiKeys
from app.api.middleware import path_of
from app.api.page import is_page
from app.api.replies import error_response
from app.errors import ForbiddenError, InvalidRequestError, ServiceError
from app.settings import HttpSettings

PROXY_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""Ray Serve's proxy obeys them from any client: with them a request stays queued when its connection is gone."""
_OPEN = ("/health", "/ready")


class AccessMiddleware:
    """Refuses requests before their body is read; ``state.key_name`` is the name of a request's key."""

    def __init__(self, app: ASGIApp, http: HttpSettings, keys: ApiKeys | None) -> None:
        self._app = app
        self._http = http
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except ServiceError as error:
                scope["state"]["error_code"] = error.code
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _needs_key(self, path: str, headers: Headers) -> bool:
        if path == "/metrics":
            return self._http.metrics_need_key
        return path not in _OPEN and not is_page(path, headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = path_of(scope)
        if self._keys is not None and self._needs_key(path, headers):
            azure = headers.get("api-key")
            given = headers.get("authorization", None if azure is None else f"Bearer {azure}")
            scope["state"]["key_name"] = self._keys.name_of(given)
        for name in PROXY_HEADERS:
            if name in headers and not self._http.allow_proxy_headers:
                raise InvalidRequestError(
                    f"the header {name} is the operator's to send; leave it out", param=name, code="header_not_allowed"
                )


def check_operator(request: Request, http: HttpSettings, what: str) -> None:
    """Let those go on who may ask the service for ``what``: any API key, or without keys this machine.

    Raises:
        ForbiddenError: the service has no keys, and the request comes from another machine.
    """
    if http.api_keys_file is None and not _is_local(request):
        raise ForbiddenError(
            f"a service without API keys {what} for its own machine only; ask from there, or set http.api_keys_file"
        )


def _is_local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
