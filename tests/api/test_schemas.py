"""Each field's type and bounds, and the spellings that count as the same value."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import openai
import pytest

from app.api.schemas import EditsRequest, ImagesRequest
from tests.api.edit_forms import RED
from tests.api.fake_backend import FakeBackend
from tests.api.refusals import assert_refused

URL = "/v1/images/generations"
EDITS = "/v1/images/edits"
PROMPT = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 7}, "prompt", "valid string, not 7"),
        ({"negative_prompt": 1}, "negative_prompt", "valid string"),
        ({"model": 3}, "model", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1, not 0"),
        ({"n": "1"}, "n", 'valid integer, not "1"'),
        ({"n": True}, "n", "valid integer, not true"),
        ({"n": 1.5}, "n", "valid integer, not 1.5"),
        ({"size": 128}, "size", "valid string"),
        ({"response_format": "raw"}, "response_format", "'b64_json', 'file' or 'url', not \"raw\""),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_format": "PNG"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"output_compression": -1}, "output_compression", "greater than or equal to 0"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": "28"}, "num_inference_steps", 'valid integer, not "28"'),
        ({"num_inference_steps": 28.5}, "num_inference_steps", "valid integer"),
        ({"num_inference_steps": True}, "num_inference_steps", "valid integer"),
        ({"guidance_scale": "3.5"}, "guidance_scale", "valid number"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"guidance_scale": False}, "guidance_scale", "valid number"),
        ({"true_cfg_scale": -0.5}, "true_cfg_scale", "greater than or equal to 0"),
        ({"cfg_scale": "4"}, "cfg_scale", "valid number"),
        ({"seed": -2}, "seed", "leave it out, or send -1"),
        ({"seed": 2**64}, "seed", "less than or equal to"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"magcache": {"enabled": 1}}, "magcache.enabled", "valid boolean, not 1"),
        ({"magcache": {"mag_threshold": -0.1}}, "magcache.mag_threshold", "greater than or equal to 0"),
        ({"magcache": {"mag_threshold": "0.1"}}, "magcache.mag_threshold", "valid number"),
        ({"magcache": {"mag_max_skip_steps": 1.5}}, "magcache.mag_max_skip_steps", "valid integer"),
        ({"magcache": {"mag_max_skip_steps": -1}}, "magcache.mag_max_skip_steps", "greater than or equal to 0"),
        ({"magcache": {"mag_retention_ratio": 1.01}}, "magcache.mag_retention_ratio", "less than or equal to 1"),
        ({"magcache": {"computed_steps": 0}}, "magcache.computed_steps", "greater than or equal to 1"),
        ({"magcache": {"min_computed_steps": 0}}, "magcache.min_computed_steps", "greater than or equal to 1"),
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
        ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"stream": True, "partial_images": -1}, "partial_images", "greater than or equal to 0"),
        ({"user": "x" * 257}, "user", "256 characters"),
    ],
)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    await assert_refused(client, backend, changes, param, words)


@pytest.mark.parametrize(("method", "schema"), [("generate", ImagesRequest), ("edit", EditsRequest)])
def test_every_field_of_the_pinned_client_is_known(method: str, schema: type[ImagesRequest]) -> None:
    parameters = set(inspect.signature(getattr(openai.resources.Images, method)).parameters)
    ours = {"self", "image", "mask", "markup", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert parameters - ours <= set(schema.model_fields)


async def test_jpg_is_jpeg(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={**PROMPT, "output_format": "jpg"})
    assert response.json()["output_format"] == backend.jobs[0].output_format == "jpeg"


async def test_integral_floats_are_integers(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    numbers = {"n": 1.0, "seed": 7.0, "num_inference_steps": 8.0, "priority": -2.0, "output_compression": 90.0}
    magcache = {"computed_steps": 4.0, "min_computed_steps": 3.0, "mag_max_skip_steps": 2.0}
    body = {**PROMPT, **numbers, "output_format": "jpeg", "magcache": magcache}
    assert (await client.post(URL, json=body)).status_code == 200
    assert (await client.post(URL, json={**body, "stream": True, "partial_images": 1.0})).status_code == 200
    form = {name: str(value) for name, value in numbers.items()} | {
        f"magcache[{name}]": str(value) for name, value in magcache.items()
    }
    data = {**PROMPT, **form, "output_format": "jpeg"}
    assert (await client.post(EDITS, data=data, files={"image": RED})).status_code == 200
    for job in backend.jobs:
        values = (job.n, job.seed, job.num_inference_steps, job.priority, job.output_compression)
        assert repr(values) == "(1, 7, 8, -2, 90)"
        options = job.magcache
        assert repr((options.computed_steps, options.min_computed_steps, options.mag_max_skip_steps)) == "(4, 3, 2)"
    response = await client.post(URL, json={**PROMPT, "seed": 2.0**60})  # no longer exact: another number may be meant
    assert (response.status_code, response.json()["error"]["param"]) == (400, "seed")
