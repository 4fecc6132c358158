"""From a well-formed request to the backend's job: defaults, the server's limits, and what has no effect."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from app.api.app import create_app
from app.api.backend import ImagesJob
from app.messages.jobs import MagCacheOptions
from app.settings import SamplingSettings, Settings
from tests.api.edit_forms import RED
from tests.api.fake_backend import FakeBackend
from tests.api.refusals import assert_refused

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
EDITS = "/v1/images/edits"


async def test_defaults_come_from_the_settings(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json=PROMPT)
    assert response.status_code == 200
    (job,) = backend.jobs
    assert job == ImagesJob(
        request_id=response.headers["x-request-id"],
        prompt="a red circle",
        negative_prompt=None,
        n=1,
        width=128,
        height=128,
        num_inference_steps=28,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        seed=job.seed,
        magcache=MagCacheOptions(enabled=True),
        output_format="png",
        output_compression=100,
    )
    assert 0 <= job.seed < 2**53


async def test_size_auto_is_the_default(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await client.post(URL, json={**PROMPT, "size": "auto"})).json()["size"] == "128x128"


async def test_what_has_no_effect_is_said(client: httpx.AsyncClient) -> None:
    body = {**PROMPT, "output_compression": 50, "magcache": {"enabled": False, "mag_threshold": 0.1}}
    response = await client.post(URL, json=body)
    assert response.json()["warnings"] == [
        "output_compression is ignored: png is lossless",
        "magcache.mag_threshold without effect: magcache.enabled is false",
    ]
    assert response.json()["data"][0]["magcache"]["enabled"] is False
    response = await client.post(URL, json={**body, "response_format": "file"})
    assert response.headers["x-warnings"].startswith("output_compression is ignored: png is lossless; magcache.")


@pytest.mark.parametrize(
    ("fields", "accept", "media_type"),
    [
        ({"response_format": "file"}, "*/*", "image/png"),
        ({"response_format": "file", "output_format": "jpeg"}, "application/json", "image/jpeg"),
        ({"response_format": "file"}, "image/webp", "image/webp"),
        ({}, "image/png", "image/png"),
        ({}, "image/jpeg, */*;q=0.5", "image/jpeg"),
        ({}, "image/png;q=0.5, image/webp", "image/webp"),
        ({}, "image/*", "image/png"),
        ({"output_format": "webp"}, "image/*", "image/webp"),
        ({"output_format": "webp"}, "image/png, image/webp", "image/webp"),
        ({}, "image/gif, image/png", "image/png"),
        ({"response_format": "b64_json"}, "image/png", "application/json"),
        ({}, "application/json", "application/json"),
        ({}, "application/json, image/png", "application/json"),
        ({}, "image/png;q=0", "application/json"),
        ({}, "", "application/json"),
        ({}, ";;q=,,é", "application/json"),
        ({"output_format": "jpeg"}, "*/*", "application/json"),
    ],
)
async def test_file_or_json(client: httpx.AsyncClient, fields: dict[str, Any], accept: str, media_type: str) -> None:
    response = await client.post(URL, json={**PROMPT, **fields}, headers=[(b"Accept", accept.encode("latin-1"))])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == media_type
    if media_type != "application/json":
        assert Image.open(io.BytesIO(response.content)).get_format_mimetype() == media_type


@pytest.mark.parametrize(
    ("fields", "accept", "status", "param"),
    [
        ({}, "image/gif", 406, "Accept"),
        ({"output_format": "jpeg"}, "image/png", 400, "output_format"),
        ({"n": 2}, "image/png", 400, "n"),
    ],
)
async def test_an_accept_header_that_cannot_be_met(
    client: httpx.AsyncClient, fields: dict[str, Any], accept: str, status: int, param: str
) -> None:
    response = await client.post(URL, json={**PROMPT, **fields}, headers={"Accept": accept})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": " \n"}, "prompt", "must not be empty"),
        ({"prompt": "x" * 32001}, "prompt", "32001 characters"),
        ({"prompt": "a\ud800"}, "prompt", "surrogate"),
        ({"negative_prompt": "\udfff"}, "negative_prompt", "surrogate"),
        ({"negative_prompt": "x" * 32001}, "negative_prompt", "at most 32000"),
        ({"model": "dall-e-3"}, "model", "'dall-e-3' is not served here; this service has 'flux-tiny'"),
        ({"n": 11}, "n", "at most 10"),
        ({"size": "128"}, "size", "WIDTHxHEIGHT or auto"),
        ({"size": "128X128"}, "size", "WIDTHxHEIGHT"),
        ({"size": " 128x128"}, "size", "WIDTHxHEIGHT"),
        ({"size": "128x128\n"}, "size", "WIDTHxHEIGHT"),
        ({"size": "١٢٨x128"}, "size", "WIDTHxHEIGHT"),
        ({"size": "-128x128"}, "size", "WIDTHxHEIGHT"),
        ({"size": "0x128"}, "size", "nearest to 0 is 64"),
        ({"size": "100x128"}, "size", "nearest to 100 is 96"),
        ({"size": "1024x1024"}, "size", "from 64 to 256; the nearest to 1024 is 256"),
        ({"response_format": "file", "n": 2}, "n", "one image"),
        ({"num_inference_steps": 101}, "num_inference_steps", "at most 100"),
        ({"num_inference_steps": 10**50}, "num_inference_steps", "100"),
        ({"seed": 2**64 - 1, "n": 2}, "seed", "seed + n - 1"),
        ({"stream": True, "response_format": "file"}, "response_format", "a stream is events"),
        ({"partial_images": 2}, "partial_images", "set stream to true"),
        ({"stream": False, "progress": True}, "progress", "set stream to true"),
    ],
)
async def test_a_field_beyond_the_limits_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    await assert_refused(client, backend, changes, param, words)


async def test_sizes_are_bounded_by_their_pixels_too(backend: FakeBackend) -> None:
    app = create_app(Settings(sampling=SamplingSettings(max_pixels=128 * 128)), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await client.post(URL, json={**PROMPT, "size": "64x256"})).status_code == 200
        response = await client.post(URL, json={**PROMPT, "size": "144x128"})
    assert response.status_code == 400
    assert "at most 16384" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"style": "vivid"}, "style is ignored: this service has no such switch"),
        ({"style": "natural"}, "style is ignored: this service has no such switch"),
        ({"complexity": "high"}, "complexity is ignored: this service has no such switch"),
        ({"frame_count": 8}, "frame_count is ignored: this service has no such switch"),
        ({"frame_duration_ms": 40}, "frame_duration_ms is ignored: this service has no such switch"),
        ({"svg": {"model": "x"}}, "svg is ignored: this service has no such switch"),
        ({"quality": "xhigh"}, "quality 'xhigh' is taken as 'high'; magcache.enabled false computes every step"),
        ({"quality": "max"}, "quality 'max' is taken as 'high'; magcache.enabled false computes every step"),
    ],
)
async def test_fields_of_the_newest_client_are_taken_with_a_warning(
    client: httpx.AsyncClient, fields: dict[str, Any], warning: str
) -> None:
    response = await client.post(URL, json={**PROMPT, **fields})
    assert (response.status_code, response.json()["warnings"]) == (200, [warning])
    assert response.headers["x-warnings"] == warning
    if "quality" in fields:
        assert response.json()["quality"] == "high"
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    response = await client.post(EDITS, data={**PROMPT, **form}, files={"image": RED})
    assert (response.status_code, response.json()["warnings"]) == (200, [warning])


async def test_seeds(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for seed in (-1, -1.0, 2**64 - 1, None):
        assert (await client.post(URL, json={**PROMPT, "seed": seed})).status_code == 200
    drawn, again, largest, absent = (job.seed for job in backend.jobs)
    assert largest == 2**64 - 1
    assert len({drawn, again, absent}) == 3
    assert all(0 <= seed < 2**53 for seed in (drawn, again, absent))
