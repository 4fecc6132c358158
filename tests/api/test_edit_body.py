"""Images of edits under every name and in every form that clients send, their order, and what is refused in words."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.families import FLUX2_KLEIN
from tests.api.edit_forms import RED, URL, encoded, plain
from tests.api.fake_backend import FakeBackend

BLUE = encoded(plain(64, 80, "blue"))
RED_URL, BLUE_URL = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (RED, BLUE))


def form(*parts: tuple[str, str | bytes]) -> dict[str, Any]:
    """The arguments of a multipart request with ``parts`` in their order; bytes are files."""
    files = [(name, ("a.png", part) if isinstance(part, bytes) else (None, part)) for name, part in parts]
    return {"files": [("prompt", (None, "a")), *files]}


def colours(backend: FakeBackend) -> list[str]:
    """The colours of the last job's sources."""
    return ["red" if source.pixels[0, 0, 0] > 200 else "blue" for source in backend.jobs[-1].sources]


@pytest.mark.parametrize(
    "parts",
    [
        [("image[0]", RED), ("image[1]", BLUE)],
        [("image[1]", BLUE), ("image[0]", RED)],
        [("images", RED), ("images", BLUE)],
        [("images[]", RED), ("images[]", BLUE)],
        [("image", RED), ("image", BLUE_URL)],
        [("image", RED_URL), ("image", BLUE_URL)],
        [("image[0]", RED_URL), ("image[1]", BLUE)],
        [("image_url", RED_URL), ("url", BLUE_URL)],
        [("image[0][image_url]", RED_URL), ("image[1][url]", BLUE_URL)],
        [("image", json.dumps([RED_URL, {"image_url": BLUE_URL}]))],
    ],
)
async def test_forms(client: httpx.AsyncClient, backend: FakeBackend, parts: list[tuple[str, str | bytes]]) -> None:
    backend.kind = FLUX2_KLEIN
    reply = await client.post(URL, **form(*parts))
    assert reply.status_code == 200, reply.text
    assert colours(backend) == ["red", "blue"]


@pytest.mark.parametrize(
    "fields",
    [
        {"images": [RED_URL, BLUE_URL]},
        {"image": [RED_URL, BLUE_URL]},
        {"images": [{"image_url": RED_URL}, {"image_url": BLUE_URL, "file_id": None}]},
        {"images[]": [RED_URL, BLUE_URL]},
        {"image[1]": BLUE_URL, "image[0]": RED_URL},
        {"images": [{"type": "image_url", "image_url": {"url": RED_URL, "detail": "auto"}}, {"url": BLUE_URL}]},
        {"image": base64.b64encode(RED).decode(), "image_url": {"b64_json": base64.urlsafe_b64encode(BLUE).decode()}},
    ],
)
async def test_json(client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any]) -> None:
    backend.kind = FLUX2_KLEIN
    reply = await client.post(URL, json={"prompt": "a", "seed": 4, "magcache": {"enabled": False}, **fields})
    assert reply.status_code == 200, reply.text
    assert colours(backend) == ["red", "blue"]
    assert (backend.jobs[-1].seed, backend.jobs[-1].magcache.enabled) == (4, False)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"image": "https://example.com/a.png"}, "image", "this service fetches nothing"),
        ({"image_url": {"url": "HTTP://example.com"}}, "image_url", "fetches nothing"),
        ({"images": [RED_URL, "file:///etc/passwd"]}, "images[1]", "is a URL (file:)"),
        ({"images": ["s3://bucket/a.png"]}, "images[0]", "fetches nothing"),
        ({"images": [{"file_id": "file-1"}]}, "images[0]", "stores no files"),
        ({"images": [{"path": "a"}]}, "images[0]", "must have one of image_url, url, b64_json, not 'path'"),
        ({"images": [{}]}, "images[0]", "not nothing"),
        ({"images": [[RED_URL]]}, "images[0]", "must be an image"),
        ({"image": 5}, "image", "must be an image"),
        ({"image": {"image_url": {"url": {"url": RED_URL}}}}, "image", "must be an image"),
        ({"image": "red.png"}, "image", "neither a data URL nor base64"),
        ({"image": "data:image/png;base64,AAAA"}, "image", "cannot be read as a PNG"),
        ({"image": None}, "image", "this field is required"),
        ({"images": []}, "image", "this field is required"),
        ({"image": RED_URL, "markup": RED_URL}, "markup", "no model here reads a markup"),
        ({"image": RED_URL, "init_image": RED_URL}, "init_image", "images come in the field image"),
        ({"image": RED_URL, "mask_image": RED_URL}, "mask_image", "a mask comes in the field mask"),
    ],
)
async def test_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], param: str, says: str
) -> None:
    for body in ({"json": {"prompt": "a", **fields}}, form(*((name, _text(value)) for name, value in fields.items()))):
        reply = await client.post(URL, **body)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        # A form has no numbers: 5 is text there, and so is null.
        if not isinstance(fields.get("image", ""), int | None):
            assert error["param"] == param
            assert says in error["message"]
    assert not backend.jobs


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("name", ["markup", "control_image", "image2", "image[0].png"])
async def test_other_files_are_named(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.post(URL, **form(("image", RED), (name, BLUE)))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, name, "unknown_parameter")
    assert name in error["message"]


async def test_masks_have_one_place(client: httpx.AsyncClient) -> None:
    for name in ("mask", "mask[]", "mask[0]", "mask_url"):
        for body in (form(("image", RED), (name, BLUE)), {"json": {"prompt": "a", "image": RED_URL, name: BLUE_URL}}):
            assert (await client.post(URL, **body)).json()["error"]["param"] == "mask", name


async def test_json_nested_deeply_is_a_400(client: httpx.AsyncClient) -> None:
    nested = "[" * 900 + "]" * 900
    for body in (f'{{"prompt": "a", "image": {nested}}}', f'{{"prompt": "a", "image": {nested.replace("[", "[[")}}}'):
        assert (await client.post(URL, content=body)).status_code == 400
    assert (await client.post(URL, **form(("image", nested)))).status_code == 400


async def test_settings_stay_short_where_images_are_long(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    url = f"data:image/png;base64,{base64.b64encode(encoded(Image.fromarray(noise))).decode()}"
    assert len(url) > 1 << 20
    assert (await client.post(URL, **form(("image", url)))).status_code == 200
    reply = await client.post(URL, **form(("image", RED), ("negative_prompt", "x" * (1 << 20) + "y")))
    assert (reply.status_code, reply.json()["error"]["param"]) == (413, "negative_prompt")
