"""Edits over HTTP: multipart forms, images within limits, and what each kind of model does with them."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image

from app.api.app import create_app
from app.engine.families import FLUX2_KLEIN, FLUX_KONTEXT, FLUX_SCHNELL
from app.settings import Settings
from tests.api.edit_forms import RED, assert_form_refused, encoded, plain, post_edit
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/edits"


async def test_a_form_becomes_a_job(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = {"n": "2", "seed": "5", "num_inference_steps": "10", "strength": "0.5", "size": "128x96", "user": "5"}
    reply = await post_edit(client, output_format="webp", **{"magcache[mag_threshold]": "0.1"}, **fields)
    assert reply.status_code == 200, reply.text
    (job,) = backend.jobs
    assert (job.n, job.seed, job.num_inference_steps, job.strength) == (2, 5, 10, 0.5)
    assert (job.width, job.height, job.output_format) == (128, 96, "webp")
    assert job.magcache.mag_threshold == 0.1
    (source,) = job.sources
    assert source.pixels.shape == (96, 128, 3)  # scaled to the size of the image to make
    assert (source.pixels == (255, 0, 0)).all()
    assert len(reply.json()["data"]) == 2


async def test_defaults(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """Strength as in diffusers; the size has the image's shape and the default number of pixels."""
    assert (await post_edit(client, size="auto", seed="", magcache="")).status_code == 200
    (job,) = backend.jobs
    assert job.strength == 0.6
    assert (job.width, job.height) == (160, 112)


async def test_what_has_no_effect_is_a_warning(client: httpx.AsyncClient) -> None:
    reply = await post_edit(client, input_fidelity="high")
    assert reply.json()["warnings"] == ["input_fidelity is ignored: FLUX.1-dev has no such switch"]


async def test_models_that_read_images(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.kind = FLUX2_KLEIN
    files = [("image[]", RED), ("image[]", encoded(plain(64, 80, "blue"), "JPEG"))]
    reply = await client.post(URL, data={"prompt": "both"}, files=files)
    assert reply.status_code == 200, reply.text
    (job,) = backend.jobs
    assert job.strength is None
    assert [source.pixels.shape for source in job.sources] == [(64, 96, 3), (80, 64, 3)]
    assert job.sources[1].pixels[0, 0, 2] > 250

    backend.kind = FLUX_KONTEXT
    reply = await client.post(URL, data={"prompt": "both"}, files=files)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "image: 2 images were sent, FLUX.1-Kontext takes at most 1"
    reply = await post_edit(client, strength="0.5")
    assert reply.json()["error"]["param"] == "strength"


async def test_a_model_without_edits_says_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.kind = FLUX_SCHNELL
    reply = await post_edit(client)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "edits_not_supported"
    assert error["message"].startswith("FLUX.1-schnell makes images from prompts only and edits none")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"strength": "0"}, "strength", "greater than 0"),
        ({"strength": "1.1"}, "strength", "less than or equal to 1"),
        ({"size": "100x100"}, "size", "multiples of 16"),
        ({"strenght": "0.5"}, "strenght", "did you mean 'strength'"),
        ({"magcache[treshold]": "1"}, "magcache.treshold", "mag_threshold"),
        ({"input_fidelity": "medium"}, "input_fidelity", "'high' or 'low'"),
    ],
)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], param: str, says: str
) -> None:
    await assert_form_refused(client, backend, fields, param, says)


async def test_images_must_come_as_files_named_image(client: httpx.AsyncClient) -> None:
    for files, param in (
        ({"picture": RED}, "picture"),
        ({"image": RED, "mask": RED}, "mask"),
        ({"prompt2": RED}, "prompt2"),
    ):
        reply = await client.post(URL, data={"prompt": "a"}, files=files)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    text = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    reply = await client.post(URL, content=text, headers=boundary)
    assert reply.json()["error"] == {
        "message": "image: this field is required",
        "type": "invalid_request_error",
        "param": "image",
        "code": "missing_required_parameter",
    }
    reply = await client.post(URL, content=b"prompt=a", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (415, "Content-Type")


async def test_a_body_too_large_is_not_read(backend: FakeBackend) -> None:
    app: FastAPI = create_app(Settings.model_validate({"http": {"max_edit_bytes": 2048}}), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert (await post_edit(client)).status_code == 200
        assert (await post_edit(client, encoded(Image.fromarray(noise)))).status_code == 413


def test_the_official_client(openai_client: openai.OpenAI, backend: FakeBackend) -> None:
    reply = openai_client.images.edit(
        model="flux-tiny",
        image=("red.png", RED, "image/png"),
        prompt="make it blue",
        n=2,
        size="128x128",
        response_format="b64_json",
        output_format="jpeg",
        quality="auto",
        user="somebody",
        extra_body={"seed": 3, "strength": 0.5, "magcache": {"mag_threshold": 0.1, "mag_max_skip_steps": 2}},
    )
    assert reply.data is not None
    assert [item.model_extra["seed"] for item in reply.data if item.model_extra] == [3, 4]
    image = Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json or "")))
    assert (image.format, image.size) == ("JPEG", (128, 128))
    (job,) = backend.jobs
    assert (job.strength, job.magcache.mag_threshold, job.magcache.mag_max_skip_steps) == (0.5, 0.1, 2)

    backend.kind = FLUX2_KLEIN
    openai_client.images.edit(image=[RED, encoded(plain(), "WEBP")], prompt="both")
    assert len(backend.jobs[1].sources) == 2

    events = list(openai_client.images.edit(image=RED, prompt="on the way", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.images.edit(image=b"no image", prompt="a")
    assert refused.value.param == "image"
