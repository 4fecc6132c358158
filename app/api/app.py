"""The FastAPI application: routes, middleware, and every error in OpenAI's envelope."""

from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route

from app.api import calibrations, edits, lora_routes, page
from app.api.access import AccessMiddleware
from app.api.backend import Backend
from app.api.drain import DrainMiddleware
from app.api.keys import ApiKeys
from app.api.middleware import RequestMiddleware
from app.api.openapi import openapi_of
from app.api.replies import error_response
from app.api.routes import new_service, router
from app.errors import InvalidRequestError, ServiceError
from app.settings import Settings

ROUTERS = (router, edits.router, calibrations.router, lora_routes.router, page.router)


def create_app(
    settings: Settings, get_backend: Callable[[], Backend], *, process: str = "api", id_added_in_front: bool = False
) -> FastAPI:
    """The service's HTTP side.

    Args:
        process: what metrics call this process.
        get_backend: called once per request.
        id_added_in_front: the server in front already adds the request's X-Request-Id to replies (Ray Serve's proxy).
    """
    # No redirects: a POST with a stray slash would come back as a GET with some clients.
    app = FastAPI(
        title="flux-magcache-serve",
        summary="FLUX images over HTTP in OpenAI's dialect, tensor-parallel, with MagCache per request.",
        version="1",
        redirect_slashes=False,
    )
    app.state.service = service = new_service(settings, get_backend, process)
    for each in ROUTERS:
        app.include_router(each)
    keys = None if settings.http.api_keys_file is None else ApiKeys(settings.http.api_keys_file)
    app.add_middleware(DrainMiddleware, drain=service.drain)
    app.add_middleware(AccessMiddleware, http=settings.http, keys=keys)
    app.add_middleware(
        RequestMiddleware, metrics=service.metrics, tracing=service.tracing, id_added_in_front=id_added_in_front
    )
    if settings.http.cors_origins:  # outermost, so that a page's script can read every error
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.openapi = lambda: openapi_of(app, settings)  # type: ignore[method-assign]
    return app


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    request.state.error_code = error.code
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors, such as an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    messages = {
        HTTPStatus.NOT_FOUND: (f"there is no {path!r} here; GET / lists the endpoints", "unknown_url"),
        HTTPStatus.METHOD_NOT_ALLOWED: (f"{path!r} does not take {request.method}", "method_not_allowed"),
    }
    message, code = messages.get(HTTPStatus(error.status_code), (str(error.detail), "invalid_request"))
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed(request) or headers["Allow"]
    return error_response(InvalidRequestError(message, code=code, status=error.status_code, headers=headers))


def _allowed(request: Request) -> str:
    """All methods of the request's path among `ROUTERS`; Starlette's own error has those of its first route only."""
    routes = [route for each in ROUTERS for route in each.routes if isinstance(route, Route)]
    found = [route.methods for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for methods in found for method in methods or ()}))
