"""What guidance does for each kind of model."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.api.guidance import DEFAULT_TRUE_CFG_SCALE, guidance_scale, true_cfg
from app.api.schemas import ImagesRequest
from app.engine.families import FLUX2_KLEIN, FLUX2_KLEIN_BASE, FLUX_DEV, FLUX_SCHNELL
from app.errors import InvalidRequestError
from app.settings import SamplingSettings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}
NO_NEGATIVE = "true_cfg_scale is ignored without a negative_prompt"
LOW_SCALE = "negative_prompt is ignored: it takes effect with a true_cfg_scale above 1"


def asked(**fields: Any) -> ImagesRequest:
    return ImagesRequest(prompt="a", **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("", 4.0)),
        ({"true_cfg_scale": 2.5}, ("", 2.5)),
        ({"true_cfg_scale": 1.0}, (None, 1.0)),
        ({"negative_prompt": "blue"}, ("blue", 4.0)),
        ({"negative_prompt": ""}, ("", 4.0)),
        ({"negative_prompt": "blue", "true_cfg_scale": 3.0}, ("blue", 3.0)),
    ],
)
def test_a_model_without_distilled_guidance_runs_true_cfg(
    fields: dict[str, Any], expected: tuple[str | None, float]
) -> None:
    warnings: list[str] = []
    assert true_cfg(asked(**fields), FLUX2_KLEIN_BASE, warnings) == expected
    assert warnings == []


def test_a_distilled_model_refuses_a_negative_prompt() -> None:
    warnings: list[str] = []
    with pytest.raises(InvalidRequestError, match=r"FLUX\.2-klein is distilled to run without one") as refused:
        true_cfg(asked(negative_prompt="blue"), FLUX2_KLEIN, warnings)
    assert refused.value.param == "negative_prompt"
    assert true_cfg(asked(negative_prompt=" "), FLUX2_KLEIN, warnings) == (None, 1.0)
    assert true_cfg(asked(true_cfg_scale=1), FLUX2_KLEIN, warnings) == (None, 1.0)
    assert warnings == []
    assert true_cfg(asked(true_cfg_scale=4), FLUX2_KLEIN, warnings) == (None, 1.0)
    assert warnings == ["true_cfg_scale is ignored: FLUX.2-klein is distilled to run without it"]


def test_guidance_without_an_embedding_is_a_warning() -> None:
    warnings: list[str] = []
    limits = SamplingSettings()
    assert guidance_scale(asked(), FLUX_SCHNELL, limits, warnings) == 3.5
    assert guidance_scale(asked(guidance_scale=2), FLUX_DEV, limits, warnings) == 2
    assert warnings == []
    guidance_scale(asked(guidance_scale=2), FLUX_SCHNELL, limits, warnings)
    assert warnings == ["guidance_scale is ignored: FLUX.1-schnell has no guidance embedding"]


async def test_the_served_model_decides(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.kind = FLUX2_KLEIN
    reply = await client.post("/v1/images/generations", json={"prompt": "a", "negative_prompt": "blue"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "negative_prompt")
    backend.kind = FLUX2_KLEIN_BASE
    reply = await client.post("/v1/images/generations", json={"prompt": "a"})
    assert reply.status_code == 200
    assert (backend.jobs[0].negative_prompt, backend.jobs[0].true_cfg_scale) == ("", 4.0)


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
