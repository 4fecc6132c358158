"""What a good request becomes: the job that the backend gets, and the reply that the client gets."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from app.api.app import create_app
from app.api.backend import ImagesJob
from app.api.guidance import DEFAULT_TRUE_CFG_SCALE
from app.api.schemas import ImagesRequest
from app.messages import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from tests.api.fake_backend import SCHEDULE, FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


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


async def test_everything_that_a_request_may_say(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {
        **PROMPT,
        "model": "flux-tiny",
        "n": 2,
        "size": "192x64",
        "response_format": "b64_json",
        "output_format": "webp",
        "output_compression": 80,
        "negative_prompt": "blue",
        "num_inference_steps": 8,
        "guidance_scale": 2,
        "cfg_scale": 3.0,
        "seed": 2**63 - 2,
        "magcache": {
            "enabled": True,
            "mag_threshold": 0.1,
            "mag_max_skip_steps": 2,
            "mag_retention_ratio": 0.25,
            "min_computed_steps": 3,
        },
        "priority": -3,
        "deadline_s": 60,
        "quality": "auto",
        "background": "opaque",
        "moderation": "low",
        "style": None,
        "stream": False,
        "partial_images": 0,
        "progress": False,
        "user": "somebody",
        "safety_identifier": None,
    }
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    (job,) = backend.jobs
    assert (job.n, job.width, job.height, job.num_inference_steps) == (2, 192, 64, 8)
    assert (job.guidance_scale, job.true_cfg_scale, job.negative_prompt) == (2.0, 3.0, "blue")
    assert (job.seed, job.output_format, job.output_compression) == (2**63 - 2, "webp", 80)
    assert job.magcache == MagCacheOptions(True, 0.1, 2, 0.25, min_computed_steps=3, client_chose=True)
    assert (job.priority, job.deadline_s, job.partial_images) == (-3, 60.0, 0)

    reply = response.json()
    assert set(reply) == {"created", "data", "background", "output_format", "quality", "size", "usage", "warnings"}
    assert (reply["output_format"], reply["size"], reply["warnings"]) == ("webp", "192x64", [])
    assert (reply["background"], reply["quality"]) == ("opaque", "auto")
    # Two prompts of 32 tokens each, two images of 12 x 4 tokens.
    assert reply["usage"] == {
        "input_tokens": 64,
        "output_tokens": 96,
        "total_tokens": 160,
        "input_tokens_details": {"text_tokens": 64, "image_tokens": 0},
    }
    assert [item["seed"] for item in reply["data"]] == [2**63 - 2, 2**63 - 1]
    first = reply["data"][0]
    image = Image.open(io.BytesIO(base64.b64decode(first["b64_json"])))
    assert (image.format, image.size) == ("WEBP", (192, 64))
    assert first["magcache"] == {
        "enabled": True,
        "schedule": SCHEDULE,
        "computed": 4,
        "skipped": 4,
        "predicted_error": 0.125,
        "negative_schedule": SCHEDULE,
        "lowered_by": None,
        "uncached_reason": None,
    }
    assert (first["eta_s"], first["queue_position"]) == (1.5, 2)
    assert first["timings"] == {"queue_s": 0.01, "encode_s": 0.02, "denoise_s": 0.2, "decode_s": 0.03, "total_s": 0.26}


async def test_null_counts_as_absent(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = (set(ImagesRequest.model_fields) | {"cfg_scale"}) - {"prompt"}
    assert (await client.post(URL, json={**PROMPT, **dict.fromkeys(fields)})).status_code == 200
    assert (await client.post(URL, json={**PROMPT, "cfg_scale": None, "true_cfg_scale": 3})).status_code == 200
    assert (await client.post(URL, json={**PROMPT, "magcache": {"mag_threshold": None}})).status_code == 200
    assert backend.jobs[0].magcache == backend.jobs[2].magcache == MagCacheOptions()


async def test_size_auto_is_the_default(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await client.post(URL, json={**PROMPT, "size": "auto"})).json()["size"] == "128x128"


NO_NEGATIVE = "true_cfg_scale is ignored without a negative_prompt"
LOW_SCALE = "negative_prompt is ignored: it takes effect with a true_cfg_scale above 1"


@pytest.mark.parametrize(
    ("fields", "negative", "scale", "warnings"),
    [
        ({"true_cfg_scale": 4}, None, 1.0, [NO_NEGATIVE]),
        ({"true_cfg_scale": 1}, None, 1.0, []),
        ({"negative_prompt": "blue"}, "blue", DEFAULT_TRUE_CFG_SCALE, []),
        ({"negative_prompt": "blue", "true_cfg_scale": 4}, "blue", 4.0, []),
        ({"negative_prompt": "blue", "true_cfg_scale": 1}, None, 1.0, [LOW_SCALE]),
        ({"negative_prompt": "blue", "cfg_scale": 0.5}, None, 1.0, [LOW_SCALE]),
        ({"negative_prompt": ""}, None, 1.0, []),
        ({"negative_prompt": "", "true_cfg_scale": 2.5}, "", 2.5, []),
    ],
)
async def test_true_cfg_runs_as_in_diffusers(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    fields: dict[str, Any],
    negative: str | None,
    scale: float,
    warnings: list[str],
) -> None:
    response = await client.post(URL, json={**PROMPT, **fields})
    assert response.json()["warnings"] == warnings
    assert (backend.jobs[0].negative_prompt, backend.jobs[0].true_cfg_scale) == (negative, scale)
    assert (response.json()["data"][0]["magcache"]["negative_schedule"] is None) == (negative is None)


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


async def test_a_request_overrides_the_servers_magcache(backend: FakeBackend) -> None:
    server = MagCacheSettings(enabled=False, mag_threshold=0.2, mag_max_skip_steps=4)
    app = create_app(Settings(magcache=server), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for magcache in (
            {},
            {"enabled": True},
            {"enabled": True, "mag_threshold": 0, "mag_retention_ratio": 1},
            {"enabled": True, "computed_steps": 9},
        ):
            assert (await client.post(URL, json={**PROMPT, "magcache": magcache})).status_code == 200
    assert [job.magcache for job in backend.jobs] == [
        MagCacheOptions(False, 0.2, 4, None),
        MagCacheOptions(True, 0.2, 4, None),
        MagCacheOptions(True, 0.0, 4, 1.0, client_chose=True),
        MagCacheOptions(True, None, 4, None, computed_steps=9, client_chose=True),
    ]


@pytest.mark.parametrize(
    ("fields", "share", "said"),
    [
        ({"quality": "low"}, 0.25, "low"),
        ({"quality": "medium"}, 0.4, "medium"),
        ({"quality": "high"}, 0.65, "high"),
        ({"quality": "hd"}, 0.65, "high"),
        ({"quality": "standard"}, None, "auto"),
        ({"quality": "auto"}, None, "auto"),
        ({}, None, "auto"),
    ],
)
async def test_quality_is_a_share_of_computed_steps(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], share: float | None, said: str
) -> None:
    response = await client.post(URL, json={**PROMPT, **fields})
    assert response.status_code == 200, response.text
    options = backend.jobs[0].magcache
    assert (options.enabled, options.computed_share, options.computed_steps) == (True, share, None)
    assert options.client_chose == (share is not None)
    assert response.json()["quality"] == said


async def test_a_quality_asks_for_reuse_where_the_server_has_none_by_default(backend: FakeBackend) -> None:
    settings = Settings(magcache=MagCacheSettings(enabled=False, mag_threshold=0.2))
    app = create_app(settings, lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for fields in ({"quality": "low"}, {"quality": "auto"}):
            assert (await client.post(URL, json={**PROMPT, **fields})).status_code == 200
    low, auto = (job.magcache for job in backend.jobs)
    assert (low.enabled, low.computed_share, low.mag_threshold) == (True, 0.25, None)
    assert (auto.enabled, auto.computed_share, auto.mag_threshold) == (False, None, 0.2)


@pytest.mark.parametrize(
    ("magcache", "chose"),
    [
        ({}, False),
        ({"mag_max_skip_steps": 3}, False),
        ({"min_computed_steps": 3}, False),
        ({"mag_threshold": 0.2}, True),  # also where it is the server's own
        ({"computed_steps": 9}, True),
    ],
)
async def test_what_the_client_chose_is_said_and_not_guessed(
    backend: FakeBackend, magcache: dict[str, Any], chose: bool
) -> None:
    app = create_app(Settings(magcache=MagCacheSettings(mag_threshold=0.2)), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await client.post(URL, json={**PROMPT, "magcache": magcache})).status_code == 200
    assert backend.jobs[0].magcache.client_chose is chose


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
