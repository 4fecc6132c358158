"""What every refused request has in common."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.fake_backend import FakeBackend


async def assert_refused(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    """A good request with ``changes`` gets a 4xx in OpenAI's envelope that names ``param``; no job is made of it."""
    body = json.dumps({"prompt": "a red circle", **changes})
    headers = {"Content-Type": "application/json"}
    response = await client.post("/v1/images/generations", content=body, headers=headers)
    assert response.status_code == (404 if param == "model" and "dall" in body else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert set(error) == {"message", "type", "param", "code"}
    assert backend.jobs == []
