"""The official client against the application on a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import threading

import openai
import pytest
from PIL import Image

from app.errors import BusyError, DeadlinePassedError, RequestCancelledError, ServiceError
from tests.api.fake_backend import SCHEDULE, FakeBackend


def test_a_image(openai_client: openai.OpenAI) -> None:
    reply = openai_client.images.generate(
        model="flux-tiny",
        prompt="a red circle",
        n=2,
        size="192x128",
        response_format="b64_json",
        output_format="jpeg",
        output_compression=90,
        quality="auto",
        background="auto",
        moderation="auto",
        user="somebody",
        extra_body={"seed": 3, "num_inference_steps": 8, "magcache": {"mag_threshold": 0.1}},
    )
    assert reply.data is not None
    assert len(reply.data) == 2
    for index, item in enumerate(reply.data):
        assert item.b64_json is not None
        image = Image.open(io.BytesIO(base64.b64decode(item.b64_json)))
        assert (image.format, image.size) == ("JPEG", (192, 128))
        assert item.model_extra is not None
        assert item.model_extra["seed"] == 3 + index
        assert item.model_extra["magcache"]["schedule"] == SCHEDULE
    assert (reply.size, reply.output_format) == ("192x128", "jpeg")
    assert (reply.quality, reply.background) == ("auto", "opaque")
    assert reply.usage is not None
    assert reply.usage.output_tokens == 2 * 12 * 8
    assert reply.model_extra == {"warnings": []}
    assert reply._request_id


async def test_the_async_client(base_url: str, backend: FakeBackend) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=60) as client:
        await asyncio.gather(*(client.images.generate(prompt=f"image {index}") for index in range(8)))
    assert {job.prompt for job in backend.jobs} == {f"image {index}" for index in range(8)}


def test_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["flux-tiny"]
    assert openai_client.models.retrieve("flux-tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-image-1")


def test_errors_become_the_clients_exceptions(openai_client: openai.OpenAI, backend: FakeBackend) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        openai_client.images.generate(prompt="a", size="1000x1000")
    assert bad.value.param == "size"
    with pytest.raises(openai.BadRequestError) as unknown:
        openai_client.images.generate(prompt="a", extra_body={"stepz": 3})
    assert (unknown.value.param, unknown.value.code) == ("stepz", "unknown_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.images.generate(prompt="a", model="gpt-image-1")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as streaming:
        openai_client.images.generate(prompt="a", stream=True, partial_images=5)
    assert streaming.value.param == "partial_images"
    with pytest.raises(openai.APIStatusError) as large:
        openai_client.images.generate(prompt="x" * (1 << 20))
    assert large.value.status_code == 413
    with backend.failing(BusyError(2)), pytest.raises(openai.RateLimitError) as busy:
        openai_client.images.generate(prompt="a")
    assert busy.value.response.headers["retry-after"] == "2"
    with backend.failing(RuntimeError("secret")), pytest.raises(openai.InternalServerError) as internal:
        openai_client.images.generate(prompt="a")
    assert internal.value.request_id
    assert internal.value.request_id in str(internal.value)


def test_the_clients_own_retries_get_through(base_url: str, backend: FakeBackend) -> None:
    backend.error = BusyError(1)
    threading.Timer(0.3, lambda: setattr(backend, "error", None)).start()
    with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=2, timeout=60) as client:
        assert client.images.generate(prompt="a").data
    assert len(backend.jobs) == 2


@pytest.mark.parametrize("error", [RequestCancelledError("ended"), DeadlinePassedError("too late")])
def test_the_client_does_not_ask_again_for_what_was_ended(
    base_url: str, backend: FakeBackend, error: ServiceError
) -> None:
    with (
        openai.OpenAI(base_url=base_url, api_key="unused", max_retries=2, timeout=60) as client,
        backend.failing(error),
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.images.generate(prompt="a")
    assert (caught.value.status_code, caught.value.code) == (error.status, error.code)
    assert len(backend.jobs) == 1


def test_the_raw_file(openai_client: openai.OpenAI) -> None:
    response = openai_client.images.with_raw_response.generate(
        prompt="a", extra_headers={"Accept": "image/webp"}, extra_body={"seed": 3}
    )
    assert response.headers["content-type"] == "image/webp"
    assert response.headers["x-seed"] == "3"
    assert Image.open(io.BytesIO(response.content)).size == (128, 128)
