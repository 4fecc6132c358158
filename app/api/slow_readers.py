"""ASGI middleware for a server that waits for ever for a client to read: a reply must be taken, piece by piece.

uvicorn has no time limit for sending. What a client does not read stays in the server's memory, in Ray's proxy all
events and images of the request, for as long as the client keeps its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PIECE_BYTES = 1 << 16
"""As much as uvicorn takes before it waits for the client."""


class SlowReaders:
    """Counts a client that takes no piece of its reply for ``patience_s`` as one that has left."""

    def __init__(self, app: ASGIApp, patience_s: float = 60.0) -> None:
        self._app = app
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            ClientDisconnect: the client did not read; the server closes the connection.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()

        async def send_pieces(message: Message) -> None:
            for piece in _pieces(message):
                if gone.is_set():
                    return
                try:
                    async with asyncio.timeout(self._patience_s):
                        await send(piece)
                except TimeoutError:
                    gone.set()

        await self._app(scope, lambda: _receive_unless(gone, receive), send_pieces)
        if gone.is_set():
            raise ClientDisconnect


async def _receive_unless(gone: asyncio.Event, receive: Receive) -> Message:
    """The client's next message, or its disconnect as soon as it counts as ``gone``."""
    left, message = asyncio.create_task(gone.wait()), asyncio.ensure_future(receive())
    try:
        await asyncio.wait({left, message}, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"} if left.done() else message.result()
    finally:
        left.cancel()
        message.cancel()


def _pieces(message: Message) -> Iterator[Message]:
    """``message``, or a long body in several."""
    body = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        last = start + PIECE_BYTES >= len(body)
        more = message.get("more_body", False) or not last
        yield {**message, "body": body[start : start + PIECE_BYTES], "more_body": more}
