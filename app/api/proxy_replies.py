"""What the middleware in Ray Serve's HTTP proxies answers itself, where no API process does."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from app.api.request_ids import sane_request_id
from app.errors import ServiceError


def proxy_reply(error: ServiceError, scope: Scope) -> Response:
    """``error`` in OpenAI's envelope, with the request's id as the API's own replies have it."""
    request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
    return JSONResponse(error.envelope, error.status, error.headers | {"X-Request-Id": request_id})
