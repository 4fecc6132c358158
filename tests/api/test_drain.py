"""A draining API process: what it refuses, what it finishes, and for how long it is waited for."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from app.api.drain import Drain
from tests.api.fake_backend import FakeBackend

IMAGES = "/v1/images/generations"
BODY = {"prompt": "a red circle"}


def _drain(app: FastAPI) -> Drain:
    drain: Drain = app.state.service.drain
    return drain


@pytest.mark.parametrize("path", [IMAGES, "/v1/images/edits", "/v1//images/generations/"])
async def test_new_requests_are_refused_with_the_envelope(app: FastAPI, client: httpx.AsyncClient, path: str) -> None:
    _drain(app).begin()
    reply = await client.post(path, json=BODY)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "unavailable"
    assert int(reply.headers["retry-after"]) >= 1
    assert (await client.get("/v1/models")).status_code == 200
    health = await client.get("/health")
    assert (health.status_code, health.json()["details"]["stopping"]) == (503, True)


async def test_a_request_under_way_is_counted_until_it_is_answered(
    app: FastAPI, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    drain = _drain(app)
    backend.hold = True
    request = asyncio.create_task(client.post(IMAGES, json=BODY, headers={"X-Request-Id": "held"}))
    await backend.holding.wait()
    drain.begin()
    assert drain.waits_for == 1
    assert (await client.delete("/v1/requests/held")).status_code == 200
    assert (await request).status_code == 409
    assert drain.waits_for == 0


def test_what_is_out_of_time_is_not_waited_for() -> None:
    drain = Drain(0.0)
    drain.under_way = 1
    assert drain.waits_for == 1, "the time begins with the drain"
    drain.begin()
    assert drain.waits_for == 0
