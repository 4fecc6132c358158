"""The events of a stream, as OpenAI's client reads them, and this service's own."""

from __future__ import annotations

import base64
import io
import json

import httpx
import openai
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from tests.api.fake_backend import SCHEDULE, FakeBackend
from tests.api.sse import events_of

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
STREAM = {"prompt": "a red circle", "stream": True, "seed": 7}


async def test_events_carry_base64_whatever_is_asked(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={**PROMPT, "response_format": "url", "stream": True})
    event = json.loads(response.text.strip().rpartition("data: ")[2])
    assert event["type"] == "image_generation.completed"
    assert base64.b64decode(event["b64_json"])
    assert event["warnings"] == ["response_format 'url' is ignored: the events of a stream carry b64_json"]


def image_of(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_the_openai_client_streams(openai_client: openai.OpenAI) -> None:
    stream = openai_client.images.generate(
        prompt="a red circle",
        model="flux-tiny",
        size="192x128",
        output_format="webp",
        quality="hd",
        stream=True,
        partial_images=2,
        extra_body={"seed": 3},
    )
    *partial, completed = list(stream)
    assert [type(event) for event in partial] == [ImageGenPartialImageEvent] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert isinstance(completed, ImageGenCompletedEvent)
    for event in (*partial, completed):
        # Strictly: what the client builds without complaint need not be what its types say.
        type(event).model_validate(event.model_dump(), strict=True)
        assert (event.size, event.quality, event.background, event.output_format) == (
            "192x128", "high", "opaque", "webp"
        )  # fmt: skip
        assert image_of(event.b64_json).size == (192, 128)
    assert completed.usage.output_tokens == 12 * 8
    assert completed.usage.total_tokens == completed.usage.input_tokens + completed.usage.output_tokens
    assert completed.model_extra is not None
    assert completed.model_extra["magcache"]["schedule"] == SCHEDULE
    assert (completed.model_extra["seed"], completed.model_extra["eta_s"]) == (3, 1.5)


def test_the_openai_client_takes_progress_events_for_what_they_say_they_are(openai_client: openai.OpenAI) -> None:
    stream = openai_client.images.generate(prompt="a", stream=True, extra_body={"progress": True})
    events = list(stream)
    assert [event.type for event in events] == ["flux.progress"] * 9 + ["image_generation.completed"]
    last = events[-2].model_dump()
    assert (last["step"], last["steps"], last["decision"], last["queue_position"]) == (8, 8, ".", 0)


async def test_the_events_of_several_images_name_theirs(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={**STREAM, "n": 2, "partial_images": 1, "progress": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    of_each = [[event for event in events if event["index"] == index] for index in range(2)]
    for index, mine in enumerate(of_each):
        kinds = [event["type"] for event in mine]
        assert kinds == ["flux.progress"] * 9 + ["image_generation.partial_image", "image_generation.completed"]
        assert "".join(event["decision"] for event in mine[:9]) == SCHEDULE
        assert mine[-1]["seed"] == 7 + index
    assert backend.jobs[0].partial_images == 1


async def test_progress_tells_the_plan_ahead(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.predicted_error = float("inf")  # of which JSON has none
    for negative, expected in (({}, None), ({"negative_prompt": "blue"}, SCHEDULE)):
        response = await client.post(URL, json={**STREAM, **negative, "progress": True})
        first = events_of(response.text)[0]
        assert (first["step"], first["schedule"], first["negative_schedule"]) == (0, SCHEDULE, expected)
        assert first["predicted_error"] is None


async def test_nobody_gets_what_he_did_not_ask_for(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=STREAM, headers={"Accept": "image/png"})
    assert [event["type"] for event in events_of(response.text)] == ["image_generation.completed"]
