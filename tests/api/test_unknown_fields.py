"""An unknown field is answered with the name that it has here, and only where that would be taken."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from app.engine.families import FLUX2_KLEIN
from tests.api.fake_backend import FakeBackend
from tests.api.refusals import assert_refused

URL = "/v1/images/generations"


async def message(client: httpx.AsyncClient, **fields: Any) -> str:
    response = await client.post(URL, json={"prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("steps", 8, "num_inference_steps"),
        ("sampling_steps", 8, "num_inference_steps"),
        ("numInferenceSteps", 8, "num_inference_steps"),
        ("num_images_per_prompt", 2, "n"),
        ("num_images", 2, "n"),
        ("batch_size", 2, "n"),
        ("num_outputs", 2, "n"),
        ("cfg", 4.0, "guidance_scale"),
        ("guidance", 4, "guidance_scale"),
        ("guidanceScale", 4, "guidance_scale"),
        ("neg_prompt", "blue", "negative_prompt"),
        ("random_seed", 7, "seed"),
        ("image_size", "128x64", "size"),
        ("image_format", "jpg", "output_format"),
        ("timeout", 20, "deadline_s"),
        ("mag_threshold", 0.1, "magcache.mag_threshold"),
        ("computedSteps", 8, "magcache.computed_steps"),
        ("use_magcache", {"enabled": False}, "magcache"),
    ],
)
async def test_other_programs_names(client: httpx.AsyncClient, name: str, value: Any, ours: str) -> None:
    assert await message(client, **{name: value}) == f"unknown field {name!r}; did you mean {ours!r}?"
    outer, _, inner = ours.partition(".")
    taken = await client.post(URL, json={"prompt": "a", outer: {inner: value} if inner else value})
    assert taken.status_code == 200


async def test_two_sides_are_one_size(client: httpx.AsyncClient) -> None:
    said = await message(client, width=192, height=64.0)
    assert said == (
        "unknown field 'width'; did you mean size: \"192x64\"?; unknown field 'height'; did you mean size: \"192x64\"?"
    )
    said = await message(client, width=1000, height=500)
    assert "size '1000x500': both sides must be multiples of 16" in said
    assert "did you mean" not in said
    assert "size must be WIDTHxHEIGHT" in await message(client, width=192)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", 500, "num_inference_steps must be at most 100"),
        ("steps", "many", 'valid integer, not "many"'),
        ("num_images", 0, "n: input should be greater than or equal to 1"),
        ("checkpoint", "sdxl", "'sdxl' is not served here"),
        ("previews", 2, "set stream to true"),
        ("text", "", "prompt must not be empty"),
        ("sampler", "euler", "flow-match Euler"),
        ("scheduler", "karras", "flow-match Euler"),
        ("image", "data:,", "POST /v1/images/edits"),
        ("strength", 0.5, "POST /v1/images/edits"),
        ("aspect_ratio", "16:9", "WIDTHxHEIGHT"),
        ("loras", [{"name": "star"}], "this service has no adapters"),
        ("style_preset", "anime", "valid names: "),
    ],
)
async def test_a_field_that_would_be_refused_is_not_offered(
    client: httpx.AsyncClient, name: str, value: Any, words: str
) -> None:
    said = await message(client, **{name: value})
    assert words in said
    assert "did you mean" not in said


async def test_a_hint_knows_the_model_and_the_stream(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert "did you mean 'partial_images'?" in await message(client, previews=2, stream=True)
    backend.kind = FLUX2_KLEIN
    assert "did you mean" not in await message(client, negative="blue")


@pytest.mark.parametrize("value", [4, 0.5, "a", "128x128", True, None, {"a": 1}])
async def test_whatever_is_offered_is_taken(client: httpx.AsyncClient, value: Any) -> None:
    for name in ("styl", "quallity", "moderations", "stepz", "formats", "negative_prmpt", "magcach", "seeds", "sizes"):
        offered = re.findall(r"did you mean '(\w+)'", await message(client, **{name: value}))
        for field in offered:
            response = await client.post(URL, json={"prompt": "a", field: value})
            assert response.status_code == 200, (field, response.text)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"num_inference_step": 4}, "num_inference_step", "did you mean 'num_inference_steps'?"),
        ({"steps": 4}, "steps", "did you mean 'num_inference_steps'?"),
        ({"negativ_prompt": "x"}, "negativ_prompt", "did you mean 'negative_prompt'?"),
        ({"cfgscale": 2}, "cfgscale", "did you mean 'cfg_scale'?"),
        ({"": 2}, "", "unknown field ''"),
        ({"magcache": {"treshold": 1}}, "magcache.treshold", "did you mean 'magcache.mag_threshold'?"),
        ({"magcache": {"Enabled": True}}, "magcache.Enabled", "did you mean 'magcache.enabled'?"),
    ],
)
async def test_an_unknown_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    await assert_refused(client, backend, changes, param, words)
