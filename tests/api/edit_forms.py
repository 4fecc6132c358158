"""Images to edit, and forms that hold them."""

from __future__ import annotations

import io
from typing import Any

import httpx
from PIL import Image

from tests.api.fake_backend import FakeBackend

URL = "/v1/images/edits"


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def plain(width: int = 96, height: int = 64, colour: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


RED = encoded(plain())


async def post_edit(client: httpx.AsyncClient, image: bytes = RED, **fields: str) -> httpx.Response:
    return await client.post(URL, data={"prompt": "make it blue", **fields}, files={"image": image})


async def assert_form_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], param: str, says: str
) -> None:
    """A good form with ``fields`` gets a 400 that names ``param``; no job is made of it."""
    reply = await post_edit(client, **fields)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert not backend.jobs
