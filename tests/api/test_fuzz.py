"""Whatever JSON or bytes come in, the answer is an image or a 4xx in the envelope, never a 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.app import create_app
from app.api.schemas import ImagesRequest, MagCacheBody
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

_TEXT = st.text(st.characters(codec=None), max_size=12)  # lone surrogates included
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.floats()
    | _TEXT
    | st.sampled_from(["auto", "128x128", "64x256", "file", "b64_json", "url", "png", "webp", "a circle", 10**400])
)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=8
)
_MAGCACHE = st.dictionaries(st.sampled_from([*MagCacheBody.model_fields, "x"]), _SCALARS, max_size=4)
_NAMES = st.sampled_from([*ImagesRequest.model_fields, "cfg_scale", "magcach"])
_BODIES = st.dictionaries(_NAMES | _TEXT, _JSON | _MAGCACHE, max_size=8)
_LIKELY = st.fixed_dictionaries({"prompt": st.just("a circle")}, optional={
    "n": st.integers(0, 3), "size": st.sampled_from(["auto", "64x64", "128x96", "65x64"]), "seed": st.integers(),
    "num_inference_steps": st.integers(), "guidance_scale": st.floats(), "true_cfg_scale": st.floats(),
    "negative_prompt": _TEXT, "magcache": _MAGCACHE, "output_compression": st.integers(),
})  # fmt: skip
_QUICK = settings(max_examples=150, suppress_health_check=list(HealthCheck))


def _post(body: bytes, accept: bytes = b"*/*") -> httpx.Response:
    app: FastAPI = create_app(Settings(), FakeBackend)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            headers = [(b"Content-Type", b"application/json"), (b"Accept", accept)]
            return await client.post("/v1/images/generations", content=body, headers=headers)

    return asyncio.run(post())


def _check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 406), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 8000


@_QUICK
@given(_BODIES | _LIKELY)
def test_any_object(body: dict[str, Any]) -> None:
    _check(_post(json.dumps(body).encode()))


@_QUICK
@given(_JSON)
def test_any_json(body: Any) -> None:
    _check(_post(json.dumps(body).encode()))


@_QUICK
@given(st.binary(max_size=64))
def test_any_bytes(body: bytes) -> None:
    _check(_post(body))


@_QUICK
@given(
    st.text(st.sampled_from("image/pngwebj*,;q=.01 é"), max_size=40).map(lambda text: text.strip().encode("latin-1"))
)
def test_any_accept_header(accept: bytes) -> None:
    _check(_post(b'{"prompt": "a"}', accept))
