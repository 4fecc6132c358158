"""A proxy without routes: requests wait for them, and what Ray answers meanwhile reaches no client."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from app.api.proxy_guard import middlewares
from app.api.proxy_routes import AwaitRoutes


class Proxy:
    """Knows no route for its first requests, and then an application that knows only ``/``."""

    def __init__(self, without_routes: int) -> None:
        self.without_routes = without_routes
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if self.asked <= self.without_routes:
            reply = PlainTextResponse("Path not found. Ping http://.../-/routes for available routes.", 404)
        else:
            reply = JSONResponse({}, 200 if scope["path"] == "/" else 404)
        await reply(scope, receive, send)


def client(app: AwaitRoutes) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


def test_rays_proxies_have_it() -> None:
    assert middlewares()[0].cls is AwaitRoutes


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/nowhere", 404)])
async def test_a_request_waits_for_the_routes(path: str, status: int) -> None:
    proxy = Proxy(without_routes=3)
    async with client(AwaitRoutes(proxy)) as http:
        reply = await http.post(path, content=b"a")
    assert (reply.status_code, reply.json(), proxy.asked) == (status, {}, 4)


async def test_without_an_application_the_reply_is_a_503_in_the_envelope() -> None:
    async with client(AwaitRoutes(Proxy(without_routes=1000), patience_s=0.2)) as http:
        reply = await http.get("/")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert len(reply.headers["x-request-id"]) == 32
    assert reply.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize("path", ["/-/healthz", "/other"])
async def test_a_404_of_rays_passes_for_its_own_paths_and_once_there_were_routes(path: str) -> None:
    proxy = Proxy(without_routes=0)
    async with client(AwaitRoutes(proxy)) as http:
        if path == "/other":
            assert (await http.get("/")).status_code == 200
        proxy.without_routes = 1000
        reply = await http.get(path)
    assert (reply.status_code, reply.headers["content-type"]) == (404, "text/plain; charset=utf-8")


async def test_what_is_not_http_passes() -> None:
    passed: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    await AwaitRoutes(app)({"type": "websocket"}, lambda: None, lambda message: None)
    assert passed == [{"type": "websocket"}]
