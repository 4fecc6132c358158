"""`/v1/calibrations`: what a request becomes, what is refused, and who may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.app import create_app
from app.settings import HttpSettings, Settings
from magcache_core.calibrate import packaged_prompts
from tests.api.fake_backend import FakeBackend

URL = "/v1/calibrations"


async def test_an_empty_body_takes_the_servers_defaults(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={})
    assert response.status_code == 202
    (job,) = backend.calibrations.values()
    assert response.json() == {
        "id": job.id,
        "object": "calibration",
        "status": "running",
        "phase": "probe",
        "progress": 0.0667,
        "runs": 20,
        "expected_runs": 300,
        "seconds": 12.5,
        "profile": None,
        "message": None,
    }
    assert (job.prompts, job.steps, job.width, job.height, job.guidance_scale) == (
        packaged_prompts(),
        28,
        128,
        128,
        3.5,
    )
    assert (job.computed_steps, job.budgets) == (10, (10, 7, 12, 19)), "first what it recommends, then the presets"
    assert (job.trial_runs, job.moves, job.budget_s) == (4, 6, 1800.0)
    assert (job.judge_runs, job.floors_db) == (4, (28.0, 32.0, 38.0))


async def test_every_field_counts(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    asked = {
        "prompts": ["a", "b"],
        "size": "64x96",
        "num_inference_steps": 20,
        "guidance_scale": 2,
        "budget_minutes": 0.5,
    }
    asked |= {"computed_steps": 8, "trial_runs": 0, "judge_runs": 1, "moves": 3}
    await client.post(URL, json=asked)
    (job,) = backend.calibrations.values()
    assert (job.prompts, job.steps, job.width, job.height, job.guidance_scale) == (("a", "b"), 20, 64, 96, 2.0)
    assert (job.computed_steps, job.budgets) == (8, (8, 5, 13))
    assert (job.trial_runs, job.moves, job.budget_s) == (0, 3, 30.0)
    assert (job.judge_runs, job.recorded_prompts) == (1, ("a",))


@pytest.mark.parametrize(
    ("fields", "negative", "scale"),
    [
        ({}, None, 1.0),
        ({"negative_prompt": "", "true_cfg_scale": 4}, "", 4.0),
        ({"negative_prompt": "blue"}, "blue", 2.0),
        ({"negative_prompt": ""}, None, 1.0),
    ],
)
async def test_true_cfg_runs_as_for_images(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], negative: str | None, scale: float
) -> None:
    await client.post(URL, json=fields)
    (job,) = backend.calibrations.values()
    assert (job.negative_prompt, job.true_cfg_scale) == (negative, scale)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "65x64"}, "size"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"computed_steps": 28}, "computed_steps"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", "b"], "judge_runs": 2}, "judge_runs"),
        ({"prompts": ["a", " "]}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"budget_minutes": 0}, "budget_minutes"),
        ({"steps": 28}, "steps"),
        ({"true_cfg_scale": 4}, "true_cfg_scale"),
        ({"negative_prompt": "a", "true_cfg_scale": 1}, "true_cfg_scale"),
        ({"negative_prompt": 7}, "negative_prompt"),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not backend.calibrations


async def test_an_unknown_field_is_answered_with_the_nearest(client: httpx.AsyncClient) -> None:
    error = (await client.post(URL, json={"budget_minute": 3})).json()["error"]
    assert (error["code"], error["message"]) == (
        "unknown_parameter",
        "unknown field 'budget_minute'; did you mean 'budget_minutes'?",
    )


async def test_progress_and_end(client: httpx.AsyncClient) -> None:
    started = (await client.post(URL, json={})).json()
    assert (await client.get(f"{URL}/{started['id']}")).json() == started
    assert (await client.head(f"{URL}/{started['id']}")).status_code == 200
    assert (await client.delete(f"{URL}/{started['id']}")).json()["status"] == "cancelled"
    missing = await client.get(f"{URL}/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "calibration_not_found")


def client_at(address: str, settings: Settings, backend: FakeBackend) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(settings, lambda: backend), client=(address, 5000))
    return httpx.AsyncClient(transport=transport, base_url="http://service")


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 202), ("::1", 202), ("10.0.0.7", 403), ("unix", 403)])
async def test_without_keys_only_this_machine_may(
    settings: Settings, backend: FakeBackend, address: str, status: int
) -> None:
    async with client_at(address, settings, backend) as client:
        assert (await client.post(URL, json={})).status_code == status
        if status == 403:
            assert (await client.get(f"{URL}/a")).status_code == (await client.delete(f"{URL}/a")).status_code == 403


async def test_with_keys_any_key_may(backend: FakeBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-1\n")
    settings = Settings(http=HttpSettings(api_keys_file=str(keys)))
    async with client_at("10.0.0.7", settings, backend) as client:
        assert (await client.post(URL, json={})).status_code == 401
        assert (await client.post(URL, json={}, headers={"Authorization": "Bearer sk-1"})).status_code == 202
