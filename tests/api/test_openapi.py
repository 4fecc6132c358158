"""The OpenAPI document is as strict as the API: what it permits is taken, what it does not is refused.

It has no words for two fields that contradict each other, nor for what an image file holds.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from app.api.app import create_app
from app.api.schemas import MAX_SEED, EditsRequest, ImagesRequest
from app.settings import Settings
from tests.api.edit_forms import RED, URL
from tests.api.fake_backend import FakeBackend
from tests.api.test_edit_body import RED_URL

SERVER = Settings.model_validate(
    {"sampling": {"max_side": 256, "max_pixels": 200 * 200}, "served_model_name": ["a", "b"]}
)
CONTRADICTIONS = re.compile(
    "set stream to true|of [0-9]+ steps at most|exclude each other|both decide the schedule|above the [0-9]+ steps"
    "|computes a share of the steps|a file reply holds one|is one file, and a stream|two names of one setting"
    "|seed [+] n"
)
VALUES: list[Any] = [
    None, True, False, -2, -1, 0, 1, 2, 3, 10, 11, 28, 100, 101, 256, 257, MAX_SEED, MAX_SEED + 1, -(2**70),
    0.5, 1.5, 2.0, 100.5, -0.5, 86400, 86401, 1e300, "", " ", "auto", "128x128", "64x256", "208x192", "208x208",
    "064x64", "65x64", "64X64", "a", "b", "ab", "file", "url", "b64_json", "png", "jpg", "gif", "low", "hd", "max",
    "vivid", "opaque", "transparent", "x" * 256, "x" * 257, "x" * 32000, "x" * 32001, [], [1], {}, {"enabled": False},
    {"enabled": 1}, {"computed_steps": 5}, {"computed_steps": 0}, {"mag_retention_ratio": 1.1}, {"unknown": 1},
    {"mag_max_skip_steps": 1001}, {"mag_threshold": None}, {"mag_threshold": -1},
]  # fmt: skip
_FIELDS = st.sampled_from([*ImagesRequest.model_fields, "cfg_scale", "unknown", "strength"])
_BODIES = st.dictionaries(_FIELDS, st.sampled_from(VALUES), max_size=3)


def validator(app: FastAPI, name: str) -> Draft202012Validator:
    """A validator of the schema ``name`` in the document of ``app``."""
    document = app.openapi()
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


APP = create_app(SERVER, FakeBackend)
GENERATIONS, JSON_EDITS, FORM_EDITS = (validator(APP, name) for name in ("ImagesRequest", "EditsJson", "EditsForm"))


def post(path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://service") as client:
            return await client.post(path, **body)

    return asyncio.run(send())


def check(reply: httpx.Response, permitted: bool, body: Any) -> None:
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200 and CONTRADICTIONS.search(reply.json()["error"]["message"]):
        return
    assert (reply.status_code == 200) == permitted, (body, reply.text[:300])


@pytest.mark.parametrize("field", [*ImagesRequest.model_fields, "cfg_scale", "strength", "unknown"])
def test_a_value_is_taken_if_the_document_permits_it(field: str) -> None:
    for value in VALUES:
        body = {"prompt": "a circle", "stream": field in ("progress", "partial_images"), field: value}
        check(post("/v1/images/generations", json=body), GENERATIONS.is_valid(body), body)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(_BODIES, st.sampled_from(["image", "images", "markup", "nothing"]), st.sampled_from([RED_URL, None, 5, [], {}]))
def test_an_edit_is_taken_if_the_document_permits_it(fields: dict[str, Any], name: str, value: Any) -> None:
    body: dict[str, Any] = {"prompt": "a circle", "n": 1, **fields}
    if name != "nothing":
        body[name] = [value] if name == "images" and value == RED_URL else value
    headers = {"Content-Type": "application/json"}
    check(post(URL, content=json.dumps(body).encode(), headers=headers), JSON_EDITS.is_valid(body), body)


@pytest.mark.parametrize(
    ("fields", "permitted"),
    [
        ({}, True),
        ({"strength": 0.5, "n": 2, "magcache": {"computed_steps": 3}, "size": "128x96", "cfg_scale": 1.5}, True),
        ({"strength": 0}, False),
        ({"size": "100x100"}, False),
        ({"style": "vivid", "quality": "hd", "stream": True}, True),
    ],
)
def test_a_form_is_taken_if_the_document_permits_it(fields: dict[str, Any], permitted: bool) -> None:
    assert FORM_EDITS.is_valid({"prompt": "a", "image": "bytes", **fields}) == permitted
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    reply = post(URL, data={"prompt": "a", **text}, files={"image": RED})
    check(reply, permitted, fields)


def test_the_document_has_every_field_of_an_edit() -> None:
    schemas = APP.openapi()["components"]["schemas"]
    for name in ("EditsForm", "EditsJson"):
        assert set(EditsRequest.model_fields) | {"image", "cfg_scale"} <= set(schemas[name]["properties"])
        assert schemas[name]["additionalProperties"] is False


def test_defaults_are_the_servers() -> None:
    schemas = create_app(Settings.model_validate({"sampling": {"num_inference_steps": 20}}), FakeBackend).openapi()
    fields = schemas["components"]["schemas"]["ImagesRequest"]["properties"]
    defaults = {name: fields[name]["default"] for name in ("size", "num_inference_steps", "guidance_scale")}
    assert defaults == {"size": "128x128", "num_inference_steps": 20, "guidance_scale": 3.5}


def test_sizes_within_a_number_of_pixels() -> None:
    pattern = APP.openapi()["components"]["schemas"]["ImagesRequest"]["properties"]["size"]["anyOf"][0]["pattern"]
    for width in range(32, 300, 16):
        for height in range(32, 300, 16):
            fits = min(width, height) >= 64 and max(width, height) <= 256 and width * height <= 200 * 200
            assert bool(re.search(pattern, f"{width}x{height}")) == fits
