"""What a reply says of its images, in JSON, in headers, and of what had no effect."""

from __future__ import annotations

import base64
import io
import json

import httpx
from PIL import Image

from app.messages.conditioning import TokenCount
from tests.api.fake_backend import SCHEDULE, FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


async def test_a_quality_without_a_profile_computes_every_step_and_says_so(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.uncached_reason = "there is no profile"
    response = await client.post(URL, json={**PROMPT, "quality": "low"})
    expected = "quality 'low' is ignored and every step computed: there is no profile"
    assert (response.status_code, response.json()["warnings"]) == (200, [expected])
    assert response.headers["x-warnings"] == expected
    assert (await client.post(URL, json=PROMPT)).json()["warnings"] == []


async def test_what_lowered_a_schedule_is_said(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.lowered_by = "deadline"
    response = await client.post(URL, json={**PROMPT, "n": 2, "deadline_s": 5, "priority": 10})
    assert [image["magcache"]["lowered_by"] for image in response.json()["data"]] == ["deadline", "deadline"]
    assert response.headers["x-magcache-lowered-by"] == "deadline, deadline"
    assert (backend.jobs[0].deadline_s, backend.jobs[0].priority) == (5.0, 10)


async def test_why_nothing_was_reused_is_said(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.uncached_reason = "made for 4 steps: every step is computed"
    response = await client.post(URL, json={**PROMPT, "n": 2})
    assert {image["magcache"]["uncached_reason"] for image in response.json()["data"]} == {backend.uncached_reason}
    assert response.headers["x-magcache-uncached-reason"] == backend.uncached_reason


async def test_an_error_that_nobody_measured_is_null(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.predicted_error = float("inf")
    response = await client.post(URL, json=PROMPT)
    assert response.status_code == 200
    assert response.json()["data"][0]["magcache"]["predicted_error"] is None
    assert "x-magcache-predicted-error" not in response.headers


async def test_json_replies_carry_the_numbers_of_each_image_in_headers(client: httpx.AsyncClient) -> None:
    headers = (await client.post(URL, json={**PROMPT, "seed": 5, "n": 2})).headers
    assert headers["x-seed"] == "5, 6"
    assert headers["x-magcache-schedule"] == f"{SCHEDULE}, {SCHEDULE}"
    assert (headers["x-eta-seconds"], headers["x-queue-position"]) == ("1.500, 1.500", "2, 2")
    assert "x-magcache-lowered-by" not in headers
    assert headers["server-timing"].endswith("total;dur=260.0")


async def test_a_file_reply_carries_the_numbers_in_headers(client: httpx.AsyncClient) -> None:
    body = {**PROMPT, "seed": 5, "response_format": "file", "negative_prompt": "blue"}
    headers = (await client.post(URL, json=body)).headers
    assert headers["x-seed"] == "5"
    assert headers["x-size"] == "128x128"
    assert headers["x-magcache-enabled"] == "true"
    assert headers["x-magcache-schedule"] == headers["x-magcache-negative-schedule"] == SCHEDULE
    assert (headers["x-magcache-computed"], headers["x-magcache-skipped"]) == ("4", "4")
    assert headers["x-magcache-predicted-error"] == "0.125"
    assert (headers["x-eta-seconds"], headers["x-queue-position"]) == ("1.500", "2")
    assert headers["server-timing"] == (
        "queue;dur=10.0, encode;dur=20.0, denoise;dur=200.0, decode;dur=30.0, total;dur=260.0"
    )


async def test_a_url_holds_the_file(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={**PROMPT, "response_format": "url", "output_format": "jpeg"})
    (image,) = response.json()["data"]
    assert image["b64_json"] is None
    head, _, content = image["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (128, 128)
    assert (await client.post(URL, json=PROMPT)).json()["data"][0]["url"] is None
    # The Accept header asks for a file only where the body leaves it open.
    response = await client.post(URL, json={**PROMPT, "response_format": "url"}, headers={"Accept": "image/png"})
    assert response.headers["content-type"] == "application/json"


async def test_a_prompt_that_is_cut_is_said(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.count = TokenCount(given=57, read=32, clip_given=90, clip_read=77)
    response = await client.post(URL, json={**PROMPT, "negative_prompt": "blue"})
    assert response.json()["warnings"] == [
        "prompt is cut: 32 of its 57 tokens are read",
        "prompt is cut for CLIP: 77 of its 90 tokens are read there",
        "negative_prompt is cut: 32 of its 57 tokens are read",
        "negative_prompt is cut for CLIP: 77 of its 90 tokens are read there",
    ]
    assert response.json()["usage"]["input_tokens_details"] == {"text_tokens": 64, "image_tokens": 0}
    backend.count = TokenCount(given=5, read=5)
    response = await client.post(URL, json={**PROMPT, "stream": True})
    event = json.loads(response.text.strip().rpartition("data: ")[2])
    assert (event["warnings"], event["usage"]["input_tokens"]) == ([], 5)


async def test_a_reply_names_the_profile_and_its_version(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/images/generations", json={"prompt": "a", "n": 2})
    assert response.headers["x-magcache-profile"] == "flux-tiny@0123456789ab"
    assert {image["magcache"]["profile"] for image in response.json()["data"]} == {"flux-tiny@0123456789ab"}


async def test_quality_is_said_in_decibels_where_it_is_known(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.floor_db = 38.0
    response = await client.post(URL, json={**PROMPT, "n": 2, "quality": "high"})
    sent = [image["magcache"] for image in response.json()["data"]]
    told = [(image["predicted_psnr_db"], image["quality_floor_db"]) for image in sent]
    assert told == [(41.3, 38.0)] * 2
    assert response.headers["x-magcache-predicted-psnr"] == "41.3, 41.3"
    assert response.headers["x-magcache-quality-floor"] == "38"
    backend.predicted_psnr_db = backend.floor_db = None
    response = await client.post(URL, json=PROMPT)
    assert not {"x-magcache-predicted-psnr", "x-magcache-quality-floor"} & set(response.headers)
    assert response.json()["data"][0]["magcache"]["predicted_psnr_db"] is None
