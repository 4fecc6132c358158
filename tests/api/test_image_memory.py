"""What uploaded images take in memory: bounded, scaled down at once, given back, and nothing for what is refused."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import json
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.api.image_memory import ImageMemory
from app.engine.families import FLUX2_KLEIN
from app.errors import BusyError, DeadlineImpossibleError, ServiceError
from app.settings import Settings
from tests.api.edit_forms import RED, URL, encoded, plain, post_edit
from tests.api.fake_backend import FakeBackend

LARGE = encoded(plain(4000, 4000))
"""16 million pixels in some tens of kilobytes."""
CUT = encoded(plain(2000, 2000))[:-200]
"""A good header, and not enough behind it: decoding it is an error."""


@pytest.fixture
def memory(app: FastAPI) -> ImageMemory:
    held: ImageMemory = app.state.service.image_memory
    return held


def test_claims_and_arrays_are_counted_and_given_back() -> None:
    memory = ImageMemory(100)
    array = np.zeros(40, dtype=np.uint8)
    memory.hold(array)
    with memory.claim(20) as claim:
        claim.grow(30)
        assert memory.held == 90
        with pytest.raises(BusyError, match="max_decoded_bytes"), memory.claim(11):
            pass
        with pytest.raises(BusyError):
            claim.grow(11)
        with pytest.raises(BusyError):
            memory.hold(np.zeros(11, dtype=np.uint8))
    assert memory.held == 40
    view = array[:2]
    del array
    gc.collect()
    assert memory.held == 40, "the view keeps it"
    del view
    gc.collect()
    assert memory.held == 0


async def test_a_waiting_request_holds_what_the_model_takes(
    client: httpx.AsyncClient, backend: FakeBackend, memory: ImageMemory
) -> None:
    assert len(LARGE) < 1 << 17
    backend.kind = FLUX2_KLEIN
    assert (await post_edit(client, LARGE)).status_code == 200
    (job,) = backend.jobs
    assert job.sources[0].pixels.nbytes == memory.held <= 256 * 256 * 3
    job.sources.clear()  # as the backend does
    await asyncio.sleep(0)  # the event loop keeps the result that this step began with
    gc.collect()
    assert memory.held == 0


@pytest.mark.parametrize("image", [b"nothing", CUT, encoded(plain(63, 64))])
async def test_a_refused_image_leaves_nothing(client: httpx.AsyncClient, memory: ImageMemory, image: bytes) -> None:
    assert (await post_edit(client, image)).status_code == 400
    assert memory.held == 0


@pytest.mark.parametrize("refusal", [BusyError(3), DeadlineImpossibleError("too short", 2.0)])
async def test_what_would_be_refused_is_not_decoded(
    client: httpx.AsyncClient, backend: FakeBackend, memory: ImageMemory, refusal: ServiceError
) -> None:
    backend.refusal = refusal
    reply = await post_edit(client, CUT, size="128x96", num_inference_steps="9", deadline_s="5")
    assert (reply.status_code, reply.json()["error"]["code"]) == (refusal.status, refusal.code)
    assert (refusal.headers.items()) <= {name.title(): value for name, value in reply.headers.items()}.items()
    (asked,) = backend.checked
    assert (asked.width, asked.height, asked.num_inference_steps, asked.deadline_s) == (128, 96, 9, 5)
    assert (backend.jobs, memory.held) == ([], 0)
    backend.refusal = None
    assert (await post_edit(client, CUT)).status_code == 400
    assert (await post_edit(client, CUT, model="another")).status_code == 404
    assert (await post_edit(client, CUT, size="100x100")).json()["error"]["param"] == "size"


async def test_beyond_the_bound_it_is_busy(client: httpx.AsyncClient, memory: ImageMemory) -> None:
    memory.take(memory.limit - 200)
    reply = await post_edit(client)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "busy")
    assert "http.max_decoded_bytes" in reply.json()["error"]["message"]
    assert int(reply.headers["Retry-After"]) >= 1
    assert memory.held == memory.limit - 200
    memory.take(100 - 96 * 64 * 16)  # room for the file now, and not to decode it
    reply = await post_edit(client)
    assert reply.status_code == 429
    memory.take(-1 << 20)
    assert (await post_edit(client)).status_code == 200


async def test_an_image_that_never_fits_is_no_wait(backend: FakeBackend) -> None:
    app = create_app(Settings.model_validate({"http": {"max_decoded_bytes": 1 << 20}}), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await post_edit(client)).status_code == 200
        reply = await post_edit(client, encoded(plain(400, 300)))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")
        assert "is 400x300, and decoding it takes 1920000 bytes" in reply.json()["error"]["message"]
        assert (await post_edit(client, encoded(plain(240, 240), "WEBP"))).status_code == 400


@pytest.mark.parametrize("compressed", [False, True])
async def test_bodies_are_counted_as_they_arrive(
    client: httpx.AsyncClient, backend: FakeBackend, memory: ImageMemory, compressed: bool
) -> None:
    image = base64.b64encode(RED + bytes(100000)).decode()
    body = json.dumps({"prompt": "a", "image": image}).encode()
    sent = gzip.compress(body, 0) if compressed else body
    held: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for place in range(0, len(sent), 20000):
            held.append(memory.held)
            yield sent[place : place + 20000]

    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if compressed else {})
    reply = await client.post(URL, content=chunks(), headers=headers)
    assert reply.status_code == 200, reply.text
    assert held[0] == 0
    assert held == sorted(set(held))
    assert held[-1] > 100000
    assert memory.held == backend.jobs[0].sources[0].pixels.nbytes == 160 * 112 * 3
