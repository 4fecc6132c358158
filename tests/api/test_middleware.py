"""Around every request: its id, HEAD, stray slashes, the log line, the count, and a 500 without secrets."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.settings import Settings
from tests.api.fake_backend import FakeBackend
from tests.api.scrape import requests_with, samples_of

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
GET_ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/models/flux-tiny", "/v1/loras", "/openapi.json", "/docs")


@pytest.mark.parametrize("given", ["abc-123", "a.b:c_d", "x" * 128])
async def test_a_sane_request_id_is_kept(
    client: httpx.AsyncClient, backend: FakeBackend, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="app.api"):
        response = await client.post(URL, json=PROMPT, headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    assert backend.jobs[0].request_id == given
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("app.api")]
    assert len(lines) == 2
    assert all(given in line for line in lines)


@pytest.mark.parametrize("given", ["", "a b", "a\tb", "x" * 129, "é", "a/b", '"'])
async def test_another_request_id_is_replaced(client: httpx.AsyncClient, backend: FakeBackend, given: str) -> None:
    response = await client.post(URL, json={}, headers=[(b"X-Request-Id", given.encode("latin-1"))])
    assert response.status_code == 400
    assert len(response.headers["x-request-id"]) == 32


async def test_every_reply_has_a_request_id_once(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere", "/docs"):
        assert len((await client.get(path)).headers.get_list("x-request-id")) == 1
    behind_proxy = create_app(Settings(), lambda: backend, id_added_in_front=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(behind_proxy), base_url="http://service") as other:
        assert "x-request-id" not in (await other.get("/health", headers={"X-Request-Id": "abc"})).headers
        assert "x-request-id" in (await other.get("/health", headers={"X-Request-Id": "a b"})).headers


async def test_the_unforeseen_is_a_500_with_the_id_and_no_secrets(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with backend.failing(RuntimeError("secret detail")), caplog.at_level(logging.ERROR, logger="app.api"):
        response = await client.post(URL, json=PROMPT)
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert any("secret detail" in str(record.exc_info) for record in caplog.records)


async def test_a_cancelled_request_cancels_the_backend_and_is_counted(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.hold = True
    request = asyncio.create_task(client.post(URL, json=PROMPT))
    await asyncio.wait_for(backend.taken.wait(), 5)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert backend.cancelled == 1
    assert (await samples_of(client))[requests_with("cancelled", "4xx")] == 1


async def test_under_a_route_prefix_the_requests_are_counted_too(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://service/prefix") as prefixed:
        assert (await prefixed.post(URL, json=PROMPT)).status_code == 200
        assert (await samples_of(prefixed))[requests_with("ok", "2xx")] == 1


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
    assert paths - {"/v1/calibrations/{calibration_id}"} <= set(GET_ROUTES)  # needs a calibration: test_calibrations.py


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
