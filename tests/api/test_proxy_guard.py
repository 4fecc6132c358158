"""The guard in Ray's proxies: headers that are no UTF-8 get 400 in the envelope, requests without an id a mark."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from app.api.proxy_guard import WITHOUT_ID, ProxyGuard, middlewares


async def reply_to(headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[dict[str, Any]]:
    """What a guarded application that answers "ok" sends; the headers go past every client's checks."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is not read")

    assert ProxyGuard in [each.cls for each in middlewares()]
    app = ProxyGuard(PlainTextResponse("ok"))
    await app({"type": kind, "method": "POST", "path": "/", "headers": headers}, receive, send)
    return sent


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ((b"x-request-id", b"caf\xe9"), "x-request-id"),
        ((b"user-agent", b"\xff\xfe"), "user-agent"),
        ((b"x-\xe9", b"a"), "x-\\xe9"),
    ],
)
async def test_bytes_that_are_no_utf8(header: tuple[bytes, bytes], named: str) -> None:
    start, body = await reply_to([(b"host", b"service"), header])
    reply = httpx.Response(start["status"], headers=start["headers"], content=body["body"])
    assert (reply.status_code, reply.headers["content-type"]) == (400, "application/json")
    assert len(reply.headers["x-request-id"]) == 32
    error = json.loads(reply.content)["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", named, "header_not_allowed")
    assert named in error["message"]


async def test_a_refusal_keeps_the_requests_own_id() -> None:
    start, _ = await reply_to([(b"x-request-id", b"mine"), (b"user-agent", b"\xff")])
    assert httpx.Headers(start["headers"])["x-request-id"] == "mine"


async def test_others_pass() -> None:
    start, body = await reply_to([(b"x-request-id", b"a"), (b"user-agent", "café ☕".encode())])
    assert (start["status"], body["body"]) == (200, b"ok")


async def test_what_is_not_http_passes() -> None:
    start, _ = await reply_to([(b"x-request-id", b"\xff")], kind="websocket")
    assert start["type"].startswith("websocket")


@pytest.mark.parametrize(("headers", "marked"), [([], True), ([(b"x-request-id", b"mine")], False)])
async def test_a_request_without_an_id_is_marked(headers: list[tuple[bytes, bytes]], marked: bool) -> None:
    seen: list[Request] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(Request(scope))

    scope = {"type": "http", "headers": [(b"host", b"service"), *headers]}
    await ProxyGuard(app)(scope, lambda: None, lambda message: None)
    (request,) = seen
    assert (WITHOUT_ID in request.headers) == marked
    assert request.headers["host"] == "service"
