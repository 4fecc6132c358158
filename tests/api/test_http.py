"""HTTP itself: HEAD, paths that end with a slash, and scripts of web pages from other origins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
GET_ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/models/flux-tiny", "/openapi.json", "/docs")


@pytest.fixture
async def browser(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings.model_validate({"http": {"cors_origins": ["https://app.example"]}}), lambda: backend)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


@pytest.mark.parametrize("path", GET_ROUTES)
async def test_head_is_get_without_a_body(client: httpx.AsyncClient, path: str) -> None:
    got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.headers["x-request-id"]
    assert got.content


async def test_no_body_is_sent_to_the_server(app: FastAPI) -> None:
    """Test clients leave out the body of a HEAD by themselves."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": "/v1/models", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    start, *rest = sent
    assert start["status"] == 200
    assert [message["body"] for message in rest] == [b""]


def test_every_get_route_is_tried(app: FastAPI) -> None:
    schema = app.openapi()["paths"]
    paths = {path.replace("{model_id}", "flux-tiny") for path, operations in schema.items() if "get" in operations}
    assert paths <= set(GET_ROUTES)


async def test_head_where_there_is_no_get(client: httpx.AsyncClient) -> None:
    assert (await client.head(URL)).status_code == 405
    assert (await client.head("/nowhere")).status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/models/", "http://service//v1/models", "/v1//models//", "/health/", "/v1/models/flux-tiny/"]
)
async def test_stray_slashes(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200


async def test_a_post_with_a_stray_slash_is_counted_like_any(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for path in (f"{URL}/", "/v1//images/generations"):
        assert (await client.post(path, json={"prompt": "a"})).status_code == 200
    assert len(backend.jobs) == 2
    counted = [
        line for line in (await client.get("/metrics")).text.splitlines() if line.startswith("flux_requests_total{")
    ]
    assert sum(float(line.split()[-1]) for line in counted) == 2


async def test_under_a_route_prefix(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app, root_path="/flux")
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        for path in ("/flux", "/flux/", "/flux/v1/models/"):
            assert (await client.get(path)).status_code == 200, path


async def test_a_preflight_is_answered(browser: httpx.AsyncClient) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-request-id",
    }
    reply = await browser.options(URL, headers=headers)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    reply = await browser.options(URL, headers={**headers, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in reply.headers


async def test_replies_and_errors_can_be_read_by_the_page(browser: httpx.AsyncClient, backend: FakeBackend) -> None:
    origin = {"Origin": "https://app.example"}
    for fields, status in (({}, 200), ({"n": 0}, 400)):
        reply = await browser.post(URL, json={"prompt": "a", **fields}, headers=origin)
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert reply.headers["access-control-expose-headers"] == "*"
    with backend.failing(RuntimeError("unforeseen")):
        reply = await browser.post(URL, json={"prompt": "a"}, headers=origin)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (500, "https://app.example")


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "a"}, headers={"Origin": "https://app.example"})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert (await client.options(URL, headers=preflight)).status_code == 405
