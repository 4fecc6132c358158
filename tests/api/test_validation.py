"""Every bad input gets a 4xx in OpenAI's envelope that names the field, and never reaches the backend."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from app.api.app import create_app
from app.settings import SamplingSettings, Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}

# changed fields -> param, words of the message
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": " \n"}, "prompt", "must not be empty"),
    ({"prompt": 7}, "prompt", "valid string, not 7"),
    ({"prompt": ["a"]}, "prompt", "not a list"),
    ({"prompt": "x" * 32001}, "prompt", "32001 characters"),
    ({"prompt": "a\ud800"}, "prompt", "surrogate"),
    ({"negative_prompt": "\udfff"}, "negative_prompt", "surrogate"),
    ({"negative_prompt": "x" * 32001}, "negative_prompt", "at most 32000"),
    ({"negative_prompt": 1}, "negative_prompt", "valid string"),
    ({"model": "dall-e-3"}, "model", "'dall-e-3' is not served here; this service has 'flux-tiny'"),
    ({"model": 3}, "model", "valid string"),
    ({"n": 0}, "n", "greater than or equal to 1, not 0"),
    ({"n": 11}, "n", "at most 10"),
    ({"n": "1"}, "n", 'valid integer, not "1"'),
    ({"n": True}, "n", "valid integer, not true"),
    ({"n": 1.5}, "n", "valid integer, not 1.5"),
    ({"size": "128"}, "size", "WIDTHxHEIGHT or auto"),
    ({"size": "128X128"}, "size", "WIDTHxHEIGHT"),
    ({"size": " 128x128"}, "size", "WIDTHxHEIGHT"),
    ({"size": "128x128\n"}, "size", "WIDTHxHEIGHT"),
    ({"size": "١٢٨x128"}, "size", "WIDTHxHEIGHT"),
    ({"size": "-128x128"}, "size", "WIDTHxHEIGHT"),
    ({"size": "0x128"}, "size", "nearest to 0 is 64"),
    ({"size": "100x128"}, "size", "nearest to 100 is 96"),
    ({"size": "1024x1024"}, "size", "from 64 to 256; the nearest to 1024 is 256"),
    ({"size": 128}, "size", "valid string"),
    ({"response_format": "raw"}, "response_format", "'b64_json', 'file' or 'url', not \"raw\""),
    ({"response_format": "file", "n": 2}, "n", "one image"),
    ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"output_format": "PNG"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
    ({"output_compression": -1}, "output_compression", "greater than or equal to 0"),
    ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
    ({"num_inference_steps": 101}, "num_inference_steps", "at most 100"),
    ({"num_inference_steps": "28"}, "num_inference_steps", 'valid integer, not "28"'),
    ({"num_inference_steps": 28.5}, "num_inference_steps", "valid integer"),
    ({"num_inference_steps": True}, "num_inference_steps", "valid integer"),
    ({"num_inference_steps": 10**50}, "num_inference_steps", "100"),
    ({"guidance_scale": "3.5"}, "guidance_scale", "valid number"),
    ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    ({"guidance_scale": False}, "guidance_scale", "valid number"),
    ({"guidance_scale": 10**400}, "guidance_scale", "so large a number"),
    ({"true_cfg_scale": -0.5}, "true_cfg_scale", "greater than or equal to 0"),
    ({"cfg_scale": "4"}, "cfg_scale", "valid number"),
    ({"cfg_scale": 4, "true_cfg_scale": 4}, "cfg_scale", "two names"),
    ({"seed": -2}, "seed", "leave it out, or send -1"),
    ({"seed": 2**64}, "seed", "less than or equal to"),
    ({"seed": 2**64 - 1, "n": 2}, "seed", "seed + n - 1"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"magcache": True}, "magcache", "not true"),
    ({"magcache": []}, "magcache", "not a list"),
    ({"magcache": {"enabled": 1}}, "magcache.enabled", "valid boolean, not 1"),
    ({"magcache": {"mag_threshold": -0.1}}, "magcache.mag_threshold", "greater than or equal to 0"),
    ({"magcache": {"mag_threshold": "0.1"}}, "magcache.mag_threshold", "valid number"),
    ({"magcache": {"mag_max_skip_steps": 1.5}}, "magcache.mag_max_skip_steps", "valid integer"),
    ({"magcache": {"mag_max_skip_steps": -1}}, "magcache.mag_max_skip_steps", "greater than or equal to 0"),
    ({"magcache": {"mag_retention_ratio": 1.01}}, "magcache.mag_retention_ratio", "less than or equal to 1"),
    ({"magcache": {"computed_steps": 0}}, "magcache.computed_steps", "greater than or equal to 1"),
    ({"magcache": {"computed_steps": 29}}, "magcache.computed_steps", "at most 28"),
    ({"magcache": {"computed_steps": 9, "mag_threshold": 0.1}}, "magcache.mag_threshold", "exclude each other"),
    ({"magcache": {"min_computed_steps": 0}}, "magcache.min_computed_steps", "greater than or equal to 1"),
    ({"magcache": {"min_computed_steps": 29}}, "magcache.min_computed_steps", "at most 28"),
    (
        {"magcache": {"computed_steps": 9, "min_computed_steps": 10}},
        "magcache.min_computed_steps",
        "above the 9 steps that magcache.computed_steps computes",
    ),
    ({"quality": "high", "magcache": {"computed_steps": 9}}, "quality", "magcache.computed_steps both decide"),
    ({"quality": "hd", "magcache": {"mag_threshold": 0.1}}, "quality", "magcache.mag_threshold both decide"),
    ({"quality": "low", "magcache": {"enabled": False}}, "quality", "magcache.enabled false computes all"),
    ({"quality": "maximum"}, "quality", "magcache.enabled to false"),
    ({"quality": 3}, "quality", "'low'"),
    ({"priority": 11}, "priority", "less than or equal to 10"),
    ({"priority": -11}, "priority", "greater than or equal to -10"),
    ({"priority": 1.5}, "priority", "valid integer"),
    ({"priority": "high"}, "priority", "valid integer"),
    ({"deadline_s": 0}, "deadline_s", "greater than 0"),
    ({"deadline_s": -1.0}, "deadline_s", "greater than 0"),
    ({"deadline_s": 1e6}, "deadline_s", "less than or equal to 86400"),
    ({"deadline_s": "5"}, "deadline_s", "valid number"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"moderation": "strict"}, "moderation", "'auto' or 'low'"),
    ({"style": "anime"}, "style", "in the prompt"),
    ({"stream": 1}, "stream", "valid boolean, not 1"),
    ({"stream": "true"}, "stream", "valid boolean"),
    ({"stream": True, "response_format": "file"}, "response_format", "a stream is events"),
    ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
    ({"stream": True, "partial_images": -1}, "partial_images", "greater than or equal to 0"),
    ({"partial_images": 2}, "partial_images", "set stream to true"),
    ({"stream": False, "progress": True}, "progress", "set stream to true"),
    ({"user": "x" * 257}, "user", "256 characters"),
    ({"num_inference_step": 4}, "num_inference_step", "did you mean 'num_inference_steps'?"),
    ({"steps": 4}, "steps", "did you mean 'num_inference_steps'?"),
    ({"negativ_prompt": "x"}, "negativ_prompt", "did you mean 'negative_prompt'?"),
    ({"cfgscale": 2}, "cfgscale", "did you mean 'cfg_scale'?"),
    ({"\ud800": 2}, "", "unicode"),
    ({"": 2}, "", "unknown field ''"),
    ({"magcache": {"treshold": 1}}, "magcache.treshold", "did you mean 'magcache.mag_threshold'?"),
    ({"magcache": {"Enabled": True}}, "magcache.Enabled", "did you mean 'magcache.enabled'?"),
]


@pytest.mark.parametrize(("changes", "param", "words"), BAD_FIELDS)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    body = json.dumps({**PROMPT, **changes})
    response = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == (404 if param == "model" and "dall" in body else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert set(error) == {"message", "type", "param", "code"}
    assert backend.jobs == []


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


async def test_a_wrong_content_type_is_415(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, data={"prompt": "a"})
    assert response.status_code == 415
    assert response.json()["error"]["param"] == "Content-Type"
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert (await client.post(URL, content=b'{"prompt": "a"}', headers=charset)).status_code == 200


async def test_a_large_body_is_413(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={"prompt": "x" * (1 << 20)})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert "1048576" in response.json()["error"]["message"]
    assert backend.jobs == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/image/generations", 404, "unknown_url"),
        ("POST", "/v1/images/variations", 404, "unknown_url"),
        ("GET", "/v1/models/gpt-image-1", 404, "model_not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/requests/nobody", 404, "request_not_found"),
        ("GET", "/v1/requests/nobody", 405, "method_not_allowed"),
    ],
)
async def test_wrong_urls_and_methods(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


async def test_sizes_are_bounded_by_their_pixels_too(backend: FakeBackend) -> None:
    app = create_app(Settings(sampling=SamplingSettings(max_pixels=128 * 128)), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await client.post(URL, json={**PROMPT, "size": "64x256"})).status_code == 200
        response = await client.post(URL, json={**PROMPT, "size": "144x128"})
    assert response.status_code == 400
    assert "at most 16384" in response.json()["error"]["message"]
