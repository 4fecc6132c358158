"""Bodies: compressed ones within the same limit, a byte order mark, and errors that name the header."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.bodies import Inflater
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
JSON = json.dumps({"prompt": "a red circle"}).encode()
RAW = zlib.compressobj(wbits=-15)
DEFLATED_BARE = RAW.compress(JSON) + RAW.flush()


async def post(client: httpx.AsyncClient, body: Any, encoding: str) -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    return await client.post(URL, content=body, headers=headers)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(JSON), "gzip"),
        (gzip.compress(JSON), "X-GZIP"),
        (gzip.compress(JSON[:9]) + gzip.compress(JSON[9:]), "gzip"),
        (zlib.compress(JSON), "deflate"),
        (DEFLATED_BARE, "deflate"),
        (JSON, "identity"),
        (gzip.compress(JSON), "identity, gzip"),
    ],
)
async def test_compressed_bodies(client: httpx.AsyncClient, backend: FakeBackend, body: bytes, encoding: str) -> None:
    assert (await post(client, body, encoding)).status_code == 200
    assert backend.jobs[0].prompt == "a red circle"


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br"])
async def test_another_encoding_is_named(client: httpx.AsyncClient, encoding: str) -> None:
    response = await post(client, JSON, encoding)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (415, "Content-Encoding")
    assert repr(encoding) in error["message"]
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (JSON, "gzip"),
        (b"", "gzip"),
        (gzip.compress(JSON)[:-4], "gzip"),
        (gzip.compress(JSON) + b"more", "gzip"),
        (zlib.compress(JSON) + b"more", "deflate"),
        (JSON, "deflate"),
    ],
)
async def test_a_damaged_body(client: httpx.AsyncClient, body: bytes, encoding: str) -> None:
    response = await post(client, body, encoding)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_encoding")


async def test_a_bomb_is_not_inflated(client: httpx.AsyncClient) -> None:
    bomb = gzip.compress(b"{" + b" " * (256 << 20))
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    response = await post(client, bomb, "gzip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert peak < 16 << 20


async def test_what_is_sent_is_limited_too(client: httpx.AsyncClient) -> None:
    """Joined gzip files may be empty, each of them: large as sent, nothing inflated."""
    response = await post(client, gzip.compress(b"") * 60_000, "gzip")
    assert response.status_code == 413


@given(st.binary(max_size=400), st.lists(st.integers(1, 40), max_size=30), st.sampled_from(["gzip", "deflate"]))
def test_chunks_of_any_size_inflate_to_the_same(data: bytes, sizes: list[int], encoding: str) -> None:
    packed = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
    inflater, content = Inflater(encoding), b""
    for size in [*sizes, len(packed)]:
        content += inflater.inflate(packed[:size], 400 - len(content))
        packed = packed[size:]
    assert content == data
    assert inflater.complete


async def test_a_byte_order_mark_is_skipped(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    assert (await client.post(URL, content=b"\xef\xbb\xbf" + JSON, headers=headers)).status_code == 200


async def test_a_compressed_form(client: httpx.AsyncClient) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}
    response = await client.post("/v1/images/edits", content=gzip.compress(form), headers=headers)
    assert response.json()["error"]["message"] == "image: this field is required"


async def test_a_wrong_content_type_is_415(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, data={"prompt": "a"})
    assert response.status_code == 415
    assert response.json()["error"]["param"] == "Content-Type"
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert (await client.post(URL, content=b'{"prompt": "a"}', headers=charset)).status_code == 200


async def test_a_large_body_is_413(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.post(URL, json={"prompt": "x" * (1 << 20)})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert "1048576" in response.json()["error"]["message"]
    assert backend.jobs == []
