"""Streams over HTTP: headers, a status before the first byte, signs of life, and an end that ends the work."""

from __future__ import annotations

from dataclasses import replace

import httpx
import openai
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.errors import BusyError, DeadlineImpossibleError, DeadlinePassedError, GenerationError
from app.settings import HttpSettings, Settings
from tests.api.fake_backend import FakeBackend
from tests.api.sse import events_of
from tests.patience import wait_for

URL = "/v1/images/generations"
STREAM = {"prompt": "a red circle", "stream": True, "seed": 7}


async def test_the_async_openai_client_streams(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=60) as client:
        stream = await client.images.generate(prompt="a", stream=True)
        assert [event.type async for event in stream] == ["image_generation.completed"]


async def test_the_headers_tell_what_is_known_at_the_beginning(client: httpx.AsyncClient) -> None:
    body = {**STREAM, "n": 2, "output_compression": 3}
    headers = (await client.post(URL, json=body, headers={"X-Request-Id": "mine"})).headers
    for name, value in {
        "x-request-id": "mine",
        "x-eta-seconds": "1.500",
        "x-queue-position": "2",
        "x-seed": "7, 8",
        "x-size": "128x128",
        "x-magcache-enabled": "true",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }.items():
        assert headers[name] == value
    assert "png is lossless" in headers["x-warnings"]


async def test_an_error_before_the_first_byte_has_its_status(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for error, status, header, value in (
        (BusyError(2.1), 429, "retry-after", "3"),
        (DeadlineImpossibleError("too soon", soonest_s=1.25), 422, "x-soonest-seconds", "1.250"),
        (RuntimeError("secret"), 500, "content-type", "application/json"),
    ):
        with backend.failing(error):
            response = await client.post(URL, json=STREAM)
        assert (response.status_code, response.headers[header]) == (status, value)
        assert "secret" not in response.text


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (DeadlinePassedError("it passed"), "deadline_passed", "failed"),
        (GenerationError("the decoder failed"), "generation_failed", "failed"),
        (RuntimeError("secret"), "internal_error", "failed"),
    ],
)
async def test_a_later_error_is_the_last_event(
    client: httpx.AsyncClient, backend: FakeBackend, error: Exception, code: str, outcome: str
) -> None:
    backend.late_error = error
    response = await client.post(URL, json={**STREAM, "progress": True})
    assert response.status_code == 200
    *_, last = events_of(response.text)
    assert last["type"] == "error"
    assert last["error"]["code"] == code
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    counted = (await client.get("/metrics")).text
    assert (
        f'flux_requests_total{{model="flux-tiny",outcome="{outcome}",process="api",status_class="5xx"}} 1.0' in counted
    )


def test_the_openai_client_raises_a_later_error(openai_client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.late_error = DeadlinePassedError("it passed")
    with pytest.raises(openai.APIError, match="it passed") as caught:
        list(openai_client.images.generate(prompt="a", stream=True))
    assert caught.value.code == "deadline_passed"


async def test_silence_is_filled(backend: FakeBackend) -> None:
    settings = Settings(http=HttpSettings(heartbeat_s=0.01))
    app = create_app(settings, lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        backend.silence_s = 0.1
        text = (await client.post(URL, json=STREAM)).text
        assert text.count(": still at work\n\n") >= 2
        assert [event["type"] for event in events_of(text)] == ["image_generation.completed"]
        # Also when nothing is known yet: the reply begins, and what it could not say stands in the events.
        backend.start_s = 0.1
        late = await client.post(URL, json=STREAM)
        assert late.text.startswith(":")
        assert "x-eta-seconds" not in late.headers
        assert [event["type"] for event in events_of(late.text)] == ["image_generation.completed"]


def test_the_openai_client_does_not_see_signs_of_life(app: FastAPI, base_url: str, backend: FakeBackend) -> None:
    impatient = Settings(http=HttpSettings(heartbeat_s=0.01))
    app.state.service = replace(app.state.service, settings=impatient)
    backend.silence_s = 0.1
    with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=60) as client:
        events = list(client.images.generate(prompt="a", stream=True))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_a_client_that_leaves_ends_the_work(base_url: str, backend: FakeBackend) -> None:
    backend.hold = True
    with httpx.Client(timeout=60) as client:
        body = {**STREAM, "progress": True}
        with client.stream("POST", f"{base_url}/images/generations", json=body) as response:
            assert next(response.iter_lines()) == "event: flux.progress"
        wait_for(lambda: backend.cancelled == 1, "it is cancelled", 60)
        metrics = base_url.replace("/v1", "/metrics")
        cancelled = 'flux_requests_total{model="flux-tiny",outcome="cancelled",process="api",status_class="4xx"} 1.0'
        wait_for(lambda: cancelled in client.get(metrics).text, "it is counted", 60)
