"""Multipart forms: text becomes the values that JSON would have had."""

from __future__ import annotations

import httpx
import pytest

from app.api.schemas import EditsRequest
from tests.api.edit_forms import RED, assert_form_refused, post_edit
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/edits"
PROMPT = {"prompt": "a red circle"}


async def test_nested_settings_as_json(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await post_edit(client, magcache='{"enabled": false}')).status_code == 200
    assert not backend.jobs[0].magcache.enabled


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"strength": "much"}, "strength", 'not "much"'),
        ({"strength": "NaN"}, "strength", 'not "NaN"'),
        ({"n": "two"}, "n", 'not "two"'),
        ({"n": "1.5"}, "n", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"magcache": "no"}, "magcache", "dictionary"),
        ({"magcache": "no", "magcache[enabled]": "true"}, "magcache", "twice"),
        ({"prompt": ""}, "prompt", "this field is required"),
    ],
)
async def test_text_that_is_no_value_is_refused_by_name(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], param: str, says: str
) -> None:
    await assert_form_refused(client, backend, fields, param, says)


async def test_a_broken_form_is_refused(client: httpx.AsyncClient) -> None:
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    text = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    for broken in (
        b"",
        b"--x",
        b"nonsense",
        text[:-8] + b"Content",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n",
    ):
        reply = await client.post(URL, content=broken, headers=boundary)
        assert reply.status_code == 400
    reply = await client.post(URL, content=text, headers={"Content-Type": "multipart/form-data"})
    assert reply.json()["error"]["code"] == "invalid_form"


async def test_a_field_may_not_be_given_twice(client: httpx.AsyncClient) -> None:
    content = b""
    for value in (b"a", b"b"):
        content += b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + value + b"\r\n"
    reply = await client.post(
        URL, content=content + b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


async def test_an_empty_field_of_a_form_is_absent(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    empty = dict.fromkeys(
        {*EditsRequest.model_fields, "cfg_scale", "magcache[enabled]", "image[]", "mask"} - {"prompt"}, ""
    )
    response = await client.post(URL, data={**PROMPT, **empty}, files={"image": RED})
    assert response.status_code == 200, response.text
    assert backend.jobs[0].negative_prompt is None
    response = await client.post(URL, data={"prompt": ""}, files={"image": RED})
    assert response.json()["error"]["code"] == "missing_required_parameter"
    # What a browser sends for a file that was not chosen.
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x\r\nContent-Disposition: form-data; '
    body += (
        b'name="mask"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n--x\r\nContent-Disposition: '
    )
    body += b'form-data; name="image"; filename="a.png"\r\n\r\n' + RED + b"\r\n--x--\r\n"
    response = await client.post(URL, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert response.status_code == 200, response.text


async def test_switches_of_a_form_ignore_case(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    data = {**PROMPT, "stream": "False", "progress": "FALSE", "magcache[enabled]": "False"}
    assert (await client.post(URL, data=data, files={"image": RED})).status_code == 200
    assert not backend.jobs[0].magcache.enabled
    response = await client.post(URL, data={**PROMPT, "stream": "True"}, files={"image": RED})
    assert response.headers["content-type"].startswith("text/event-stream")


async def test_hints_read_the_numbers_of_a_form(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, data={**PROMPT, "steps": "8"}, files={"image": RED})
    assert response.json()["error"]["message"] == "unknown field 'steps'; did you mean 'num_inference_steps'?"
    response = await client.post(URL, data={**PROMPT, "denoise": "1.5"}, files={"image": RED})
    assert "did you mean" not in response.json()["error"]["message"]
