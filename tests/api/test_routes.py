"""The routes: images with all that a request may say, health, models, metrics, cancelling, and the index."""

from __future__ import annotations

import asyncio
import base64
import io

import httpx
import pytest
from PIL import Image

from app.api import routes
from app.api.app import create_app
from app.engine.families import FLUX2_KLEIN, FLUX_DEV, FLUX_KONTEXT, FLUX_SCHNELL, Family
from app.errors import BusyError, GenerationError, UnavailableError
from app.messages.jobs import MagCacheOptions
from app.settings import Settings
from tests.api.edit_forms import RED
from tests.api.fake_backend import SCHEDULE, FakeBackend
from tests.api.scrape import requests_with, samples_of
from tests.api.sse import events_of

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
EDITS = "/v1/images/edits"


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
        "predicted_psnr_db": 41.3,
        "quality_floor_db": None,
        "negative_schedule": SCHEDULE,
        "lowered_by": None,
        "uncached_reason": None,
        "plan_reason": None,
        "profile": "flux-tiny@0123456789ab",
    }
    assert (first["eta_s"], first["queue_position"]) == (1.5, 2)
    assert first["timings"] == {"queue_s": 0.01, "encode_s": 0.02, "denoise_s": 0.2, "decode_s": 0.03, "total_s": 0.26}


async def test_names_of_the_model(backend: FakeBackend) -> None:
    app = create_app(Settings(served_model_name=["flux", "gpt-image-1", "dall-e-3"]), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for name in ("flux", "gpt-image-1", "dall-e-3", "", None):
            assert (await client.post(URL, json={**PROMPT, "model": name})).status_code == 200
        response = await client.post(URL, json={**PROMPT, "model": "flux-tiny"})
        assert (response.status_code, "this service has 'flux'" in response.text) == (404, True)
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["flux", "gpt-image-1", "dall-e-3"]
        assert (await client.get("/v1/models/gpt-image-1")).json()["id"] == "gpt-image-1"
        assert (await client.get("/health")).json()["model"] == "flux"
        response = await client.post(EDITS, data={**PROMPT, "model": "dall-e-3"}, files={"image": RED})
        assert response.status_code == 200


async def test_health(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "flux-tiny", "details": {"replicas": 1}}
    backend.ready = False
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"


@pytest.mark.parametrize(
    ("family", "images", "strength", "mask", "negative_prompt"),
    [
        (FLUX_DEV, 1, True, True, True),
        (FLUX_SCHNELL, 0, False, False, True),
        (FLUX_KONTEXT, 1, False, False, True),
        (FLUX2_KLEIN, 4, False, False, False),
    ],
)
async def test_what_models_take(
    client: httpx.AsyncClient, backend: FakeBackend, family: Family, images: int, strength: bool, mask: bool,
    negative_prompt: bool
) -> None:  # fmt: skip
    backend.kind = family
    (card,) = (await client.get("/v1/models")).json()["data"]
    said = {"images": images, "strength": strength, "mask": mask, "negative_prompt": negative_prompt}
    assert card["capabilities"] == said


@pytest.mark.parametrize("error", [UnavailableError("no group yet"), None])
async def test_models_are_listed_while_there_is_none_to_ask(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Before the first replica is up, which refuses or does not answer."""

    async def family() -> Family:
        if error is None:
            await asyncio.Event().wait()
        raise error or AssertionError

    monkeypatch.setattr(backend, "family", family)
    monkeypatch.setattr(routes, "FAMILY_S", 0.01)
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["capabilities"]) == ("flux-tiny", None)


async def test_models(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    listing = (await client.get("/v1/models")).json()
    assert listing["object"] == "list"
    (card,) = listing["data"]
    assert (card["id"], card["object"]) == ("flux-tiny", "model")
    assert (await client.get("/v1/models/flux-tiny")).json() == card
    named = create_app(Settings(served_model_name="acme/flux"), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(named), base_url="http://service") as other:
        assert (await other.get("/v1/models/acme/flux")).json()["id"] == "acme/flux"
        assert (await other.post(URL, json={**PROMPT, "model": "acme/flux"})).status_code == 200


async def test_the_index_names_endpoints_that_exist(client: httpx.AsyncClient) -> None:
    endpoints = (await client.get("/")).json()["endpoints"]
    for endpoint in endpoints:
        method, path = endpoint.split()
        response = await client.request(method, path)
        # Whatever else is wrong with so empty a request, it is the endpoint itself that says so.
        assert response.status_code != 405, endpoint
        assert response.status_code == 200 or response.json()["error"]["code"] != "unknown_url", endpoint


async def test_metrics_count_by_outcome_and_merge_the_coordinators(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    await client.post(URL, json={**PROMPT, "n": 2})
    await client.post(URL, json={})
    for error in (BusyError(3), UnavailableError(), GenerationError("the decoder failed")):
        with backend.failing(error):
            await client.post(URL, json=PROMPT)
    samples = await samples_of(client)
    for outcome, status_class in (
        ("ok", "2xx"), ("invalid", "4xx"), ("busy", "4xx"), ("unavailable", "5xx"), ("failed", "5xx")
    ):  # fmt: skip
        assert samples[requests_with(outcome, status_class)] == 1
    denoise = frozenset({("model", "flux-tiny"), ("process", "api"), ("phase", "denoise")})
    assert samples["flux_phase_duration_seconds_count", denoise] == 2
    assert samples["flux_phase_duration_seconds_sum", denoise] == pytest.approx(0.4)
    replica = frozenset({("model", "flux-tiny"), ("replica", "r0")})
    assert samples["flux_request_skip_ratio_count", replica] == 2
    assert samples["flux_request_skip_ratio_sum", replica] == pytest.approx(1.0)


async def test_metrics_survive_a_coordinator_that_is_down(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    with backend.failing(UnavailableError()):
        samples = await samples_of(client)
    assert samples[requests_with("ok", "2xx")] == 0
    assert not any(name.startswith("flux_request_skip_ratio") for name, _ in samples)


async def test_metrics_speak_openmetrics_when_asked(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_a_cancelled_request_is_told_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.hold = True
    for stream in (False, True):
        body = {"prompt": "a", "n": 3, "stream": stream}
        waiting = asyncio.create_task(client.post(URL, json=body, headers={"X-Request-Id": "mine"}))
        await asyncio.wait_for(backend.holding.wait(), 10)
        backend.holding.clear()
        assert (await client.delete("/v1/requests/others")).status_code == 404
        reply = await client.delete("/v1/requests/mine")
        assert reply.json() == {"id": "mine", "object": "request.cancelled", "pictures": 3}
        response = await waiting
        if stream:
            error = events_of(response.text)[-1]["error"]
        else:
            assert response.status_code == 409
            error = response.json()["error"]
        assert error["code"] == "request_cancelled"
        again = await client.delete("/v1/requests/mine")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "request_not_found")
    counted = (await client.get("/metrics")).text
    assert 'flux_requests_total{model="flux-tiny",outcome="cancelled",process="api",status_class="4xx"} 2.0' in counted
