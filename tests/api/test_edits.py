"""Edits over HTTP: multipart forms, images within limits, and what each kind of model does with them."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.api.app import create_app
from app.api.uploads import read_upload, size_like
from app.engine.families import FLUX2_KLEIN, FLUX_KONTEXT, FLUX_SCHNELL
from app.errors import InvalidRequestError
from app.settings import SamplingSettings, Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/edits"
LIMIT = 1 << 24


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def plain(width: int = 96, height: int = 64, colour: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


RED = encoded(plain())


async def post(client: httpx.AsyncClient, image: bytes = RED, **fields: str) -> httpx.Response:
    return await client.post(URL, data={"prompt": "make it blue", **fields}, files={"image": image})


async def test_a_form_becomes_a_job(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = {"n": "2", "seed": "5", "num_inference_steps": "10", "strength": "0.5", "size": "128x96", "user": "5"}
    reply = await post(client, output_format="webp", **{"magcache[mag_threshold]": "0.1"}, **fields)
    assert reply.status_code == 200, reply.text
    (job,) = backend.jobs
    assert (job.n, job.seed, job.num_inference_steps, job.strength) == (2, 5, 10, 0.5)
    assert (job.width, job.height, job.output_format) == (128, 96, "webp")
    assert job.magcache.mag_threshold == 0.1
    (source,) = job.sources
    assert source.pixels.shape == (64, 96, 3)
    assert (source.pixels == (255, 0, 0)).all()
    assert len(reply.json()["data"]) == 2


async def test_defaults(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """Strength as in diffusers; the size has the image's shape and the default number of pixels."""
    assert (await post(client, size="auto", seed="", magcache="")).status_code == 200
    (job,) = backend.jobs
    assert job.strength == 0.6
    assert (job.width, job.height) == (160, 112)


async def test_what_has_no_effect_is_a_warning(client: httpx.AsyncClient) -> None:
    reply = await post(client, input_fidelity="high")
    assert reply.json()["warnings"] == ["input_fidelity is ignored: FLUX.1-dev has no such switch"]


async def test_nested_settings_as_json(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await post(client, magcache='{"enabled": false}')).status_code == 200
    assert not backend.jobs[0].magcache.enabled


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
    reply = await post(client, strength="0.5")
    assert reply.json()["error"]["param"] == "strength"


async def test_a_model_without_edits_says_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.kind = FLUX_SCHNELL
    reply = await post(client)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "edits_not_supported"
    assert error["message"].startswith("FLUX.1-schnell makes images from prompts only and edits none")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"strength": "0"}, "strength", "greater than 0"),
        ({"strength": "1.1"}, "strength", "less than or equal to 1"),
        ({"strength": "much"}, "strength", 'not "much"'),
        ({"strength": "NaN"}, "strength", 'not "NaN"'),
        ({"n": "two"}, "n", 'not "two"'),
        ({"n": "1.5"}, "n", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"size": "100x100"}, "size", "multiples of 16"),
        ({"strenght": "0.5"}, "strenght", "did you mean 'strength'"),
        ({"magcache[treshold]": "1"}, "magcache.treshold", "mag_threshold"),
        ({"magcache": "no"}, "magcache", "dictionary"),
        ({"magcache": "no", "magcache[enabled]": "true"}, "magcache", "twice"),
        ({"prompt": ""}, "prompt", "this field is required"),
        ({"input_fidelity": "medium"}, "input_fidelity", "'high' or 'low'"),
        ({"image[]": "text"}, "image[]", "must be a file"),
    ],
)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], param: str, says: str
) -> None:
    reply = await post(client, **fields)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert not backend.jobs


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
    for broken in (
        b"",
        b"--x",
        b"nonsense",
        text[:-8] + b"Content",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n",
    ):
        reply = await client.post(URL, content=broken, headers=boundary)
        assert reply.status_code == 400
    reply = await client.post(URL, content=text, headers={"Content-Type": "multipart/form-data"})
    assert reply.json()["error"]["code"] == "invalid_form"
    reply = await client.post(URL, json={"prompt": "a"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (415, "Content-Type")


async def test_a_field_may_not_be_given_twice(client: httpx.AsyncClient) -> None:
    content = b""
    for value in (b"a", b"b"):
        content += b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + value + b"\r\n"
    reply = await client.post(
        URL, content=content + b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


async def test_a_body_too_large_is_not_read(backend: FakeBackend) -> None:
    app: FastAPI = create_app(Settings.model_validate({"http": {"max_edit_bytes": 2048}}), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert (await post(client)).status_code == 200
        assert (await post(client, encoded(Image.fromarray(noise)))).status_code == 413


def _animated(file_format: str) -> bytes:
    return encoded(plain(), file_format, save_all=True, append_images=[plain(colour="blue")])


def _truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise))[:6000]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: b"", "cannot be read as a PNG, JPEG or WebP"),
        (lambda: b"GIF89a" + bytes(64), "cannot be read"),
        (lambda: encoded(plain(), "GIF"), "cannot be read"),
        (lambda: encoded(plain(), "BMP"), "cannot be read"),
        (lambda: encoded(plain(), "TIFF"), "cannot be read"),
        (_truncated, "cannot be read"),
        (lambda: _animated("PNG"), "is animated"),
        (lambda: _animated("WEBP"), "is animated"),
        (lambda: encoded(plain(4097, 4096, 0, "1")), "at most 16777216 pixels"),
        (lambda: encoded(plain(20000, 20000, 0, "1")), "pixels"),
        (lambda: encoded(plain(63, 64)), "both sides need 64 pixels"),
        (lambda: encoded(plain(64, 513)), "at most 8 times"),
    ],
)
def test_a_image_that_is_not_taken(make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        read_upload(make(), "image[1]", LIMIT)
    assert refused.value.param == "image[1]"
    assert "image[1]" in refused.value.message


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain(), (255, 0, 0)),
        (plain(mode="P", colour=0), (0, 0, 0)),
        (plain(mode="L", colour=128), (128, 128, 128)),
        (plain(mode="RGBA", colour=(255, 0, 0, 0)), (255, 255, 255)),
        (plain(mode="LA", colour=(0, 255)), (0, 0, 0)),
        (Image.fromarray(np.full((64, 64), 128 * 257, dtype=np.uint16)), (128, 128, 128)),
    ],
)
def test_every_kind_becomes_opaque_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert (read_upload(encoded(image), "image", LIMIT).pixels == expected).all()


def test_a_photo_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    photo = plain(96, 64)
    photo.paste("blue", (0, 0, 48, 64))
    pixels = read_upload(encoded(photo, "JPEG", exif=exif, quality=95), "image", LIMIT).pixels
    assert pixels.shape == (96, 64, 3)
    assert pixels[10, 32, 2] > 200
    assert pixels[85, 32, 0] > 200


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
def test_a_damaged_file_is_an_error_or_a_image(file_format: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(plain(), file_format))
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    with contextlib.suppress(InvalidRequestError):
        assert read_upload(bytes(data), "image", LIMIT).pixels.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(st.integers(64, 4096), st.integers(1, 8), st.booleans())
def test_the_size_of_an_edit_is_within_the_limits(side: int, aspect: int, upright: bool) -> None:
    width, height = (side, side * aspect) if upright else (side * aspect, side)
    source = read_upload(RED, "image", LIMIT)
    shape = np.lib.stride_tricks.as_strided(source.pixels, (height, width, 3), (0, 0, 1))
    limits = SamplingSettings()
    chosen = size_like(type(source)(shape), limits)
    assert all(value % 16 == 0 and 64 <= value <= 256 for value in chosen)
    assert chosen[0] * chosen[1] <= limits.max_pixels
    assert (chosen[0] >= chosen[1]) == (width >= height) or chosen[0] == chosen[1]


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
