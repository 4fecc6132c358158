"""ASGI middleware inside Ray Serve's HTTP proxies: a request whose API process dies before its reply is made again.

Ray's proxy returns without a word then, and uvicorn answers a bare 500. Made again, the request reaches another API
process, or waits for one, and joins its images under way.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.proxy_replies import proxy_reply
from app.errors import UnavailableError

TRIES = 4
"""How often a request is made whose process dies each time: it may be the request that kills it."""
BETWEEN_TRIES_S = 0.1
"""For Serve's router to take note of the death."""
KEPT_BYTES = 64 << 20
"""Bodies of all requests that have no reply yet, at most; a request whose body finds no room is not made again."""
RETRY_COUNT = "x-stainless-retry-count"
"""OpenAI's clients send it with each attempt, from 0; above 0 it finds images whose API process died: `idempotency`."""
_IMAGES = re.compile(r"/images/(?:generations|edits)/*")


class Repeating:
    """Makes a request again, up to `TRIES` times; then, and where that would not be the same, it answers 503."""

    def __init__(self, app: ASGIApp, kept_bytes: int = KEPT_BYTES) -> None:
        self._app = app
        self._room = Room(kept_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, started = KeptBody(receive, self._room), False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            body.drop()
            await send(message)

        try:
            for _ in range(TRIES):
                await self._app(scope, body.from_the_start(), send_on)
                if started or body.client_left:
                    return
                if not (body.whole and _may_repeat(scope)):
                    break
                MutableHeaders(scope=scope)[RETRY_COUNT] = "1"
                await asyncio.sleep(BETWEEN_TRIES_S)
            error = UnavailableError("the process that served this request died; ask again", retry_after_s=1.0)
            await proxy_reply(error, scope)(scope, receive, send)
        finally:
            body.close()


class Room:
    """Bytes that bodies may take together."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def take(self, nbytes: int) -> bool:
        """Whether there is room for so much; then it is taken."""
        fits = nbytes <= self.nbytes
        self.nbytes -= nbytes if fits else 0
        return fits

    def give_back(self, nbytes: int) -> None:
        """It is free again."""
        self.nbytes += nbytes


class KeptBody:
    """What a client sends, to be received from the start again until it is dropped.

    Attributes:
        whole: all that came is kept.
        client_left: it has sent its last message.
    """

    def __init__(self, receive: Receive, room: Room) -> None:
        self.whole = True
        self.client_left = False
        self._receive = receive
        self._room = room
        self._kept: list[Message] = []
        self._nbytes = 0
        self._next: asyncio.Future[Message] | None = None

    def from_the_start(self) -> Receive:
        """Receives what is kept, and then what comes."""
        again = deque(self._kept)

        async def receive() -> Message:
            return again.popleft() if again else await self._receive_next()

        return receive

    def drop(self) -> None:
        """Keep no more."""
        self.whole = False
        self._kept.clear()
        self._room.give_back(self._nbytes)
        self._nbytes = 0

    def close(self) -> None:
        """Keep and receive no more."""
        self.drop()
        if self._next is not None:
            self._next.cancel()

    async def _receive_next(self) -> Message:
        """The next message; a wait that is cancelled, as Ray does when its call ends, loses none."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        await asyncio.wait({self._next})
        message, self._next = self._next.result(), None
        self._keep(message)
        return message

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.client_left = True
            return
        nbytes = len(message.get("body", b""))
        if not self.whole or not self._room.take(nbytes):
            self.drop()
            return
        self._kept.append(message)
        self._nbytes += nbytes


def _may_repeat(scope: Scope) -> bool:
    """Whether a request that may have been served means the same when it comes again."""
    return scope["method"] != "POST" or _IMAGES.search(scope["path"]) is not None
