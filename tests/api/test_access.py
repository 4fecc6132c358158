"""API keys over HTTP, and the headers that only operators may send."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from app.api.access import PROXY_HEADERS
from app.api.app import create_app
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
EVERYTHING = [
    ("GET", "/"),
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("POST", URL),
    ("POST", "/v1/images/edits"),
    ("DELETE", "/v1/requests/x"),
    ("GET", "/nowhere"),
    ("GET", "/healthy"),
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# clients\nalice {ALICE}\n\nbob\t{BOB}\n", encoding="utf-8")
    return path


def make_app(backend: FakeBackend, **http: Any) -> FastAPI:
    return create_app(Settings.model_validate({"http": http}), lambda: backend)


@pytest.fixture
def app(keys: Path, backend: FakeBackend) -> FastAPI:
    return make_app(backend, api_keys_file=str(keys))


@pytest.fixture
async def strict(keys: Path, backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(backend, api_keys_file=str(keys), metrics_need_key=True, cors_origins=["https://app.example"])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


@pytest.mark.parametrize(("method", "path"), EVERYTHING)
async def test_every_route_wants_a_key(client: httpx.AsyncClient, method: str, path: str) -> None:
    for headers in ({}, bearer("sk-eve"), bearer(""), {"Authorization": f"Basic {ALICE}"}, {"Authorization": ALICE}):
        response = await client.request(method, path, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.headers["x-request-id"]
        if method != "HEAD":
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    response = await client.request(method, path, headers=bearer(ALICE))
    assert response.status_code != 401


def test_the_schema_declares_it(app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == path.startswith("/v1/")


async def test_probes_and_scrapes_want_none(client: httpx.AsyncClient, strict: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert (await client.head("/health")).status_code == 200
    assert (await strict.get("/health")).status_code == 200
    assert (await strict.get("/metrics")).status_code == 401
    assert (await strict.get("/metrics", headers=bearer(BOB))).status_code == 200


async def test_a_preflight_needs_no_key(strict: httpx.AsyncClient) -> None:
    origin = {"Origin": "https://app.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert (await strict.options(URL, headers=preflight)).status_code == 200
    refused = await strict.post(URL, json=PROMPT, headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")


async def test_the_body_of_a_stranger_is_not_read(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    assert (await client.post(URL, content=body())).status_code == 401


async def test_every_key_is_compared(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same time whether the first matches, the last, or none."""
    compared: list[bytes] = []
    plain = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return plain(a, b)

    monkeypatch.setattr("app.api.keys.hmac.compare_digest", compare)
    for key in (ALICE, BOB, "sk-eve"):
        compared.clear()
        await client.get("/v1/models", headers=bearer(key))
        assert len(set(compared)) == 2


async def test_the_job_and_the_log_know_the_name_and_nothing_knows_the_key(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert (await client.post(URL, json=PROMPT, headers=bearer(BOB))).status_code == 200
        replies = [await client.post(URL, json=PROMPT, headers=bearer(key)) for key in ("sk-eve", BOB.upper())]
    assert backend.jobs[0].key_name == "bob"
    assert "by 'bob': POST" in caplog.text
    metrics = (await client.get("/metrics")).text
    assert 'code="invalid_api_key"' in metrics
    assert 'flux_key_requests_total{key="bob",model="flux-tiny",outcome="ok",process="api"} 1.0' in metrics
    for text in (caplog.text, metrics, *(reply.text for reply in replies)):
        assert not any(key in text for key in (ALICE, BOB, "sk-eve", BOB.upper()))


async def test_only_the_key_that_made_a_request_cancels_it(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.hold = True
    headers = {**bearer(ALICE), "X-Request-Id": "a"}
    request = asyncio.create_task(client.post(URL, json=PROMPT, headers=headers))
    await backend.holding.wait()
    refused = await client.delete("/v1/requests/a", headers=bearer(BOB))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_permitted")
    assert not request.done()
    assert (await client.delete("/v1/requests/a", headers=bearer(ALICE))).status_code == 200
    assert (await request).status_code == 409


def test_the_official_client(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key=ALICE, max_retries=0, timeout=60) as client:
        assert client.images.generate(prompt="a").data
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-eve").images.generate(prompt="a")


@pytest.mark.parametrize("name", PROXY_HEADERS)
async def test_headers_that_the_proxy_obeys_are_the_operators(backend: FakeBackend, name: str) -> None:
    for allowed, status in ((False, 400), (True, 200)):
        app = make_app(backend, allow_proxy_headers=allowed)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            response = await client.post(URL, json=PROMPT, headers={name.upper(): "?1"})
            assert response.status_code == status
            if not allowed:
                error = response.json()["error"]
                assert (error["param"], error["code"]) == (name, "header_not_allowed")
    assert len(backend.jobs) == 1
