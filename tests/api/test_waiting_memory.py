"""What requests keep in an API process while they wait for their images: the job, and not the body that asked."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI

from app.api.image_memory import ImageMemory
from app.errors import BusyError
from tests.api.edit_forms import URL as EDITS
from tests.api.fake_backend import FakeBackend
from tests.api.test_edit_body import RED_URL

GENERATIONS = "/v1/images/generations"
REQUESTS = 5
PROMPT, WITHOUT_EFFECT = "a" * 10_000, "x" * 900_000
KEPT = 100_000
"""Bytes of one waiting request at most: its prompt, small pixels, its tasks and frames."""
BODIES = [
    (GENERATIONS, {"prompt": PROMPT, "svg": WITHOUT_EFFECT}),
    (GENERATIONS, {"prompt": PROMPT, "complexity": [[]] * 20_000}),  # far larger once it is parsed
    (EDITS, {"prompt": PROMPT, "svg": WITHOUT_EFFECT, "image": RED_URL}),
]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def held_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def ask(client: httpx.AsyncClient, url: str, body: bytes) -> httpx.Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield body  # the one that all requests share, so that the client keeps nothing of its own

    return await client.post(url, content=chunks(), headers={"Content-Type": "application/json"})


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("url", "fields"), BODIES)
async def test_a_waiting_request_keeps_its_job_and_one_whose_client_left_nothing(
    client: httpx.AsyncClient, app: FastAPI, backend: FakeBackend, url: str, fields: dict[str, object]
) -> None:
    memory: ImageMemory = app.state.service.image_memory
    body = json.dumps(fields).encode()
    assert (await ask(client, url, body)).status_code == 200, "what is loaded once is loaded"
    backend.hold = True
    backend.jobs.clear()
    before = held_bytes()
    waiting = [asyncio.create_task(ask(client, url, body)) for _ in range(REQUESTS)]
    async with asyncio.timeout(60):
        while len(backend.held) < REQUESTS:  # noqa: ASYNC110  it has no event for tests
            await asyncio.sleep(0.01)
    assert held_bytes() - before < REQUESTS * KEPT
    sources = sum(source.pixels.nbytes for job in backend.jobs for source in job.sources)
    assert memory.held == sources
    while waiting:
        waiting[-1].cancel()
        await asyncio.wait({waiting.pop()})
    backend.jobs.clear()
    backend.identities.clear()
    backend.held.clear()
    await asyncio.sleep(0)  # the event loop keeps the result that this step began with
    assert held_bytes() - before < KEPT
    assert memory.held == 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("url", "fields"), BODIES)
async def test_refused_requests_keep_nothing(
    client: httpx.AsyncClient, app: FastAPI, backend: FakeBackend, url: str, fields: dict[str, object]
) -> None:
    body = json.dumps(fields).encode()
    backend.refusal = backend.error = BusyError(3)
    assert (await ask(client, url, body)).status_code == 429
    before = held_bytes()
    for _ in range(REQUESTS):
        assert (await ask(client, url, body)).status_code == 429
    backend.jobs.clear()
    backend.identities.clear()
    backend.checked.clear()
    assert held_bytes() - before < KEPT
    assert app.state.service.image_memory.held == 0


async def test_bodies_that_arrive_are_bounded_together(
    client: httpx.AsyncClient, app: FastAPI, backend: FakeBackend
) -> None:
    memory: ImageMemory = app.state.service.image_memory
    memory.take(memory.limit - 1000)
    reply = await ask(client, GENERATIONS, json.dumps({"prompt": PROMPT}).encode())
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "busy")
    assert memory.held == memory.limit - 1000
    assert (await ask(client, GENERATIONS, b'{"prompt": "a"}')).status_code == 200
    assert memory.held == memory.limit - 1000
