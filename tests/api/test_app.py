"""The application: unknown URLs, errors in the envelope, pages of other origins, and the schema."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.errors import BusyError, UnavailableError
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/image/generations", 404, "unknown_url"),
        ("POST", "/v1/images/variations", 404, "unknown_url"),
        ("GET", "/v1/models/gpt-image-1", 404, "model_not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/requests/nobody", 404, "request_not_found"),
        ("GET", "/v1/requests/nobody", 405, "method_not_allowed"),
    ],
)
async def test_wrong_urls_and_methods(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (URL, {"POST"}),
        ("/v1/calibrations/some", {"DELETE", "GET"}),
        ("/v1/requests/some", {"DELETE"}),
        ("/docs", {"GET", "HEAD"}),
    ],
)
async def test_a_wrong_method_is_told_of_all_right_ones(
    client: httpx.AsyncClient, path: str, allowed: set[str]
) -> None:
    response = await client.put(path)
    assert (response.status_code, set(response.headers["allow"].split(", "))) == (405, allowed)


async def test_busy_and_unavailable_say_when_to_come_back(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for error, status, code, seconds in (
        (BusyError(2.1), 429, "busy", "3"),
        (BusyError(0), 429, "busy", "1"),
        (UnavailableError(), 503, "unavailable", "5"),
    ):
        with backend.failing(error):
            response = await client.post(URL, json=PROMPT)
        assert response.status_code == status
        assert response.headers["retry-after"] == seconds
        assert response.json()["error"]["code"] == code


async def test_the_openapi_document_is_whole(client: httpx.AsyncClient, app: FastAPI) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    fields = schemas["ImagesRequest"]["properties"]
    assert {"prompt", "true_cfg_scale", "magcache", "seed"} <= set(fields)
    assert all(field["description"] for field in fields.values())
    text = str(document)
    for name in schemas:
        assert f"'#/components/schemas/{name}'" in text
    references = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert references == set(schemas)
    post = document["paths"][URL]["post"]
    errors = {"400", "401", "404", "406", "409", "413", "415", "422", "429", "500", "503", "504"}
    assert set(post["responses"]) == {"200", *errors}
    images = {"image/png", "image/jpeg", "image/webp"}
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream", *images}
    assert "HTTPValidationError" not in text
    assert (await client.get("/docs")).status_code == 200


@pytest.fixture
async def browser(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings.model_validate({"http": {"cors_origins": ["https://app.example"]}}), lambda: backend)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


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
