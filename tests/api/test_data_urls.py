"""Files that come as text."""

from __future__ import annotations

import base64

import pytest

from app.api.data_urls import decode_file
from app.errors import InvalidRequestError
from tests.api.edit_forms import RED


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/png;base64,{base64.b64encode(RED).decode()}",
        "DATA:image/png;BASE64," + base64.b64encode(RED).decode(),
        " data:;base64,\n" + base64.encodebytes(RED).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(RED).decode().rstrip("="),
        "data:image/png;name=a.png;base64," + base64.b64encode(RED).decode().replace("+", "%2B").replace("/", "%2F"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in RED),
        base64.b64encode(RED).decode(),
    ],
)
def test_texts_that_hold_a_file(text: str) -> None:
    assert decode_file(text, "image") == RED


@pytest.mark.parametrize(
    "text", ["data:image/png;base64", "red.png", "é", "data:image/png;base64,a", "../../etc/passwd"]
)
def test_texts_that_hold_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="send the file itself in a form, or a data URL"):
        decode_file(text, "image")
