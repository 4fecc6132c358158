"""Values as clients of other services send them: taken as they are meant, with a warning where they have no effect."""

from __future__ import annotations

import base64
import inspect
import io
import json
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from app.api.app import create_app
from app.api.schemas import EditsRequest, ImagesRequest
from app.messages import TokenCount
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
EDITS = "/v1/images/edits"
PROMPT = {"prompt": "a red circle"}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


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
    response = await client.post(EDITS, data={**PROMPT, **form}, files={"image": png()})
    assert (response.status_code, response.json()["warnings"]) == (200, [warning])


@pytest.mark.parametrize(("method", "schema"), [("generate", ImagesRequest), ("edit", EditsRequest)])
def test_every_field_of_the_pinned_client_is_known(method: str, schema: type[ImagesRequest]) -> None:
    parameters = set(inspect.signature(getattr(openai.resources.Images, method)).parameters)
    ours = {"self", "image", "mask", "markup", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert parameters - ours <= set(schema.model_fields)


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


async def test_events_carry_base64_whatever_is_asked(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={**PROMPT, "response_format": "url", "stream": True})
    event = json.loads(response.text.strip().rpartition("data: ")[2])
    assert event["type"] == "image_generation.completed"
    assert base64.b64decode(event["b64_json"])
    assert event["warnings"] == ["response_format 'url' is ignored: the events of a stream carry b64_json"]


async def test_jpg_is_jpeg(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={**PROMPT, "output_format": "jpg"})
    assert response.json()["output_format"] == backend.jobs[0].output_format == "jpeg"


async def test_seeds(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for seed in (-1, -1.0, 2**64 - 1, None):
        assert (await client.post(URL, json={**PROMPT, "seed": seed})).status_code == 200
    drawn, again, largest, absent = (job.seed for job in backend.jobs)
    assert largest == 2**64 - 1
    assert len({drawn, again, absent}) == 3
    assert all(0 <= seed < 2**53 for seed in (drawn, again, absent))


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
    assert (await client.post(EDITS, data=data, files={"image": png()})).status_code == 200
    for job in backend.jobs:
        values = (job.n, job.seed, job.num_inference_steps, job.priority, job.output_compression)
        assert repr(values) == "(1, 7, 8, -2, 90)"
        options = job.magcache
        assert repr((options.computed_steps, options.min_computed_steps, options.mag_max_skip_steps)) == "(4, 3, 2)"
    response = await client.post(URL, json={**PROMPT, "seed": 2.0**60})  # no longer exact: another number may be meant
    assert (response.status_code, response.json()["error"]["param"]) == (400, "seed")


async def test_an_empty_field_of_a_form_is_absent(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    empty = dict.fromkeys(
        {*EditsRequest.model_fields, "cfg_scale", "magcache[enabled]", "image[]", "mask"} - {"prompt"}, ""
    )
    response = await client.post(EDITS, data={**PROMPT, **empty}, files={"image": png()})
    assert response.status_code == 200, response.text
    assert backend.jobs[0].negative_prompt is None
    response = await client.post(EDITS, data={"prompt": ""}, files={"image": png()})
    assert response.json()["error"]["code"] == "missing_required_parameter"
    # What a browser sends for a file that was not chosen.
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x\r\nContent-Disposition: form-data; '
    body += (
        b'name="mask"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n--x\r\nContent-Disposition: '
    )
    body += b'form-data; name="image"; filename="a.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    response = await client.post(EDITS, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert response.status_code == 200, response.text


async def test_switches_of_a_form_ignore_case(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    data = {**PROMPT, "stream": "False", "progress": "FALSE", "magcache[enabled]": "False"}
    assert (await client.post(EDITS, data=data, files={"image": png()})).status_code == 200
    assert not backend.jobs[0].magcache.enabled
    response = await client.post(EDITS, data={**PROMPT, "stream": "True"}, files={"image": png()})
    assert response.headers["content-type"].startswith("text/event-stream")


async def test_hints_read_the_numbers_of_a_form(client: httpx.AsyncClient) -> None:
    response = await client.post(EDITS, data={**PROMPT, "steps": "8"}, files={"image": png()})
    assert response.json()["error"]["message"] == "unknown field 'steps'; did you mean 'num_inference_steps'?"
    response = await client.post(EDITS, data={**PROMPT, "denoise": "1.5"}, files={"image": png()})
    assert "did you mean" not in response.json()["error"]["message"]


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
        response = await client.post(EDITS, data={**PROMPT, "model": "dall-e-3"}, files={"image": png()})
        assert response.status_code == 200


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
