"""The routes of /v1/loras."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from app.api.app import create_app
from app.messages.loras import LoraFile, LoraListing
from app.settings import Settings
from tests.api.fake_backend import FakeBackend
from tests.api.test_loras import LISTING, URL, body


@pytest.fixture
def settings() -> Settings:
    return Settings(loras="adapters")


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.listing = backend.folder = LISTING
    return backend


async def test_the_listing(client: httpx.AsyncClient) -> None:
    reply = await client.get("/v1/loras")
    assert reply.json() == {
        "object": "list",
        "data": [
            {"id": "styles/watercolour", "object": "lora", "rank": 8, "bytes": 4000, "digest": "0123456789ab"},
            {"id": "star", "object": "lora", "rank": 4, "bytes": 3000, "digest": "ba9876543210"},
        ],
        "refused": [{"id": "broken", "reason": "it has no matrices"}],
    }


async def test_a_reload_changes_what_requests_may_name(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    new = LoraFile("new", "0" * 12, 2, 10)
    backend.folder = LoraListing({"new": new})
    assert (await client.post(URL, json=body({"name": "new"}))).status_code == 404
    reply = await client.post("/v1/loras/reload")
    assert [card["id"] for card in reply.json()["data"]] == ["new"]
    assert (await client.post(URL, json=body({"name": "new"}))).status_code == 200
    assert (await client.post(URL, json=body({"name": "star"}))).status_code == 404


async def post_from(address: str, settings: Settings, backend: FakeBackend, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(settings, lambda: backend), client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        return await client.post("/v1/loras/reload", headers=headers)


async def test_who_may_reload(tmp_path: Path, settings: Settings, backend: FakeBackend) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice secret-of-alice\n")
    with_keys = settings.model_copy(update={"http": settings.http.model_copy(update={"api_keys_file": str(keys)})})
    assert (await post_from("127.0.0.1", settings, backend)).status_code == 200
    assert (await post_from("10.0.0.1", settings, backend)).status_code == 403
    assert (await post_from("127.0.0.1", with_keys, backend)).status_code == 401
    assert (await post_from("10.0.0.1", with_keys, backend, Authorization="Bearer secret-of-alice")).status_code == 200


async def test_a_reload_without_a_folder_is_refused(backend: FakeBackend) -> None:
    reply = await post_from("127.0.0.1", Settings(), backend)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "loras_not_configured")
