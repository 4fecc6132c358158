"""From bytes to a request: no JSON, no object, several bad fields at once; each answer names what is wrong."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.api.schemas import ImagesRequest
from app.messages.jobs import MagCacheOptions
from tests.api.fake_backend import FakeBackend
from tests.api.refusals import assert_refused

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": ["a"]}, "prompt", "not a list"),
        ({"guidance_scale": 10**400}, "guidance_scale", "so large a number"),
        ({"cfg_scale": 4, "true_cfg_scale": 4}, "cfg_scale", "two names"),
        ({"magcache": True}, "magcache", "not true"),
        ({"magcache": []}, "magcache", "not a list"),
        ({"\ud800": 2}, "", "unicode"),
    ],
)
async def test_what_is_wrong_with_a_body_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    await assert_refused(client, backend, changes, param, words)


async def test_every_bad_field_is_told_at_once(client: httpx.AsyncClient) -> None:
    error = (await client.post(URL, json={"n": 0, "seeed": 1})).json()["error"]
    assert error["param"] == "prompt"
    assert error["code"] == "missing_required_parameter"
    for words in ("prompt: this field is required", "n: ", "did you mean 'seed'?"):
        assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "magcache": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        ('{"prompt": "a"}'.encode("utf-16"), "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"prompt"', "JSON object"),
    ],
)
async def test_a_body_that_is_no_json_object(client: httpx.AsyncClient, body: bytes, words: str) -> None:
    response = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert words in response.json()["error"]["message"]


async def test_a_number_too_large_for_a_double_is_refused(client: httpx.AsyncClient) -> None:
    body = b'{"prompt": "a", "guidance_scale": 1e999}'
    response = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guidance_scale"


async def test_null_counts_as_absent(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = (set(ImagesRequest.model_fields) | {"cfg_scale"}) - {"prompt"}
    assert (await client.post(URL, json={**PROMPT, **dict.fromkeys(fields)})).status_code == 200
    assert (await client.post(URL, json={**PROMPT, "cfg_scale": None, "true_cfg_scale": 3})).status_code == 200
    assert (await client.post(URL, json={**PROMPT, "magcache": {"mag_threshold": None}})).status_code == 200
    assert backend.jobs[0].magcache == backend.jobs[2].magcache == MagCacheOptions()
