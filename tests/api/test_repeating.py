"""Requests whose API process dies: made again with the same body, or answered with 503 in the envelope."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.proxy_guard import middlewares
from app.api.repeating import RETRY_COUNT, TRIES, Repeating

IMAGES = "/v1/images/generations"


@dataclass
class Proxy:
    """Ray's proxy: it reads in a task that it cancels when the call ends, and has no reply while ``deaths`` are left.

    Attributes:
        dies_after_s: of its first attempts.
        begins: it dies with its reply begun.
        seen: of each attempt the body, as far as it had come, and the headers.
    """

    deaths: int
    dies_after_s: float = 0.01
    begins: bool = False
    seen: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, whole = bytearray(), asyncio.Event()
        dies = self.deaths > 0
        self.deaths -= 1

        async def read() -> None:
            while (message := await receive())["type"] == "http.request":
                body.extend(message["body"])
                if not message["more_body"]:
                    whole.set()

        reading = asyncio.create_task(read())
        await (asyncio.sleep(self.dies_after_s) if dies else whole.wait())
        reading.cancel()
        self.seen.append((bytes(body), dict(Request(scope).headers)))
        if not dies:
            await PlainTextResponse("ok")(scope, receive, send)
        elif self.begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})


@dataclass
class Client:
    """Sends its body in ``pieces``, each of which takes ``piece_s``, and leaves at the end if it ``leaves``."""

    pieces: list[bytes]
    piece_s: float = 0.0
    leaves: bool = False
    sent: list[Message] = field(default_factory=list)
    _turn: int = 0

    async def receive(self) -> Message:
        if self._turn == len(self.pieces):
            await asyncio.sleep(0 if self.leaves else 60)
            return {"type": "http.disconnect"}
        self._turn += 1
        await asyncio.sleep(self.piece_s)
        more = self._turn < len(self.pieces)
        return {"type": "http.request", "body": self.pieces[self._turn - 1], "more_body": more}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: Callable[..., Any], method: str = "POST", path: str = IMAGES) -> int:
        """The status of the reply, 0 without one."""
        headers = [(b"x-request-id", b"mine")]
        await app({"type": "http", "method": method, "path": path, "headers": headers}, self.receive, self.send)
        return next((message["status"] for message in self.sent if "status" in message), 0)


def test_rays_proxies_have_it() -> None:
    assert middlewares()[1].cls is Repeating, "inside of those that refuse or cut off: that is not made again"


@pytest.mark.parametrize(("method", "path"), [("POST", IMAGES), ("POST", "//images/edits/"), ("DELETE", "/v1/a")])
async def test_it_is_made_again_with_the_whole_body(method: str, path: str) -> None:
    proxy, client = Proxy(deaths=TRIES - 1), Client([b"abc", b"def"])
    assert await client.ask(Repeating(proxy), method, path) == 200
    assert [body for body, _ in proxy.seen] == [b"abcdef"] * TRIES
    assert [headers.get(RETRY_COUNT) for _, headers in proxy.seen] == [None, *["1"] * (TRIES - 1)]
    assert {headers["x-request-id"] for _, headers in proxy.seen} == {"mine"}


async def test_a_body_that_is_on_its_way_reaches_the_next_process() -> None:
    proxy, client = Proxy(deaths=1, dies_after_s=0.05), Client([b"abc", b"def"], piece_s=0.04)
    assert await client.ask(Repeating(proxy)) == 200
    assert [body for body, _ in proxy.seen] == [b"abc", b"abcdef"]


@pytest.mark.parametrize(("deaths", "path", "tries"), [(TRIES, IMAGES, TRIES), (1, "/v1/calibrations", 1)])
async def test_what_cannot_be_made_again_gets_503(deaths: int, path: str, tries: int) -> None:
    proxy, client = Proxy(deaths), Client([b"abc"])
    assert await client.ask(Repeating(proxy), "POST", path) == 503
    assert len(proxy.seen) == tries
    headers = dict(client.sent[0]["headers"])
    assert (headers[b"retry-after"], headers[b"x-request-id"]) == (b"1", b"mine")
    assert json.loads(client.sent[1]["body"])["error"]["code"] == "unavailable"


async def test_bodies_are_kept_up_to_a_bound() -> None:
    proxy = Proxy(deaths=0)
    app = Repeating(proxy, kept_bytes=6)
    for _ in range(2):
        proxy.deaths = 1
        assert await Client([b"abc", b"defg"]).ask(app) == 503, "too large to be kept"
        proxy.deaths = 1
        assert await Client([b"abc", b"def"]).ask(app) == 200, "the room of others is free again"
        proxy.deaths = TRIES
        assert await Client([b"abc", b"def"]).ask(app) == 503


async def test_bodies_are_kept_until_the_reply_begins() -> None:
    proxy, begun, ended = Proxy(deaths=1), asyncio.Event(), asyncio.Event()

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await proxy(scope, receive, send)
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        begun.set()
        await ended.wait()

    app = Repeating(streaming, kept_bytes=3)
    stream = asyncio.create_task(Client([b"abc"]).ask(app, "PUT"))
    await begun.wait()
    assert await Client([b"abc"]).ask(app) == 200
    ended.set()
    assert await stream == 200


async def test_a_reply_that_has_begun_is_not_begun_again() -> None:
    proxy, client = Proxy(deaths=1, begins=True), Client([b"abc"])
    await client.ask(Repeating(proxy))
    assert [message["type"] for message in client.sent] == ["http.response.start"]
    assert len(proxy.seen) == 1


async def test_nothing_is_made_again_for_a_client_that_left() -> None:
    proxy, client = Proxy(deaths=1), Client([b"abc"], leaves=True)
    assert await client.ask(Repeating(proxy)) == 0
    assert len(proxy.seen) == 1


async def test_what_is_not_http_passes() -> None:
    passed: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    client = Client([])
    await Repeating(app)({"type": "websocket"}, client.receive, client.send)
    assert passed == [{"type": "websocket"}]
