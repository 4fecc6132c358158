"""Clients that do not read their replies, against a real server: they count as gone, and nothing is kept for them."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.proxy_guard import middlewares
from app.api.slow_readers import PIECE_BYTES, SlowReaders

LARGE = bytes(range(256)) * (40 << 12)  # 40 MiB, beyond what the sockets hold
READERS = 20


class Replies:
    """One large body at `/body`, an endless stream elsewhere; ``ended`` is set when a reply's work is over.

    ``streamed`` counts pieces of streams.
    """

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.streamed = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Response(LARGE) if Request(scope).url.path == "/body" else StreamingResponse(self._stream())
        try:
            await reply(scope, receive, send)
        finally:
            self.ended.set()

    async def _stream(self) -> AsyncIterator[bytes]:
        while True:
            self.streamed += 1
            yield LARGE[:PIECE_BYTES]
            await asyncio.sleep(0)


@asynccontextmanager
async def served(replies: Replies, patience_s: float) -> AsyncIterator[tuple[str, int]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(SlowReaders(replies, patience_s), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()
        server.should_exit = True
        await task  # once its connections are closed


@pytest.fixture
def reader() -> Iterator[socket.socket]:
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setblocking(False)
        yield reader


@pytest.mark.parametrize("path", ["/body", "/stream"])
async def test_a_client_that_does_not_read_counts_as_gone(reader: socket.socket, path: str) -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    async with served(replies, patience_s=0.3) as address:
        await loop.sock_connect(reader, address)
        await loop.sock_sendall(reader, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        async with asyncio.timeout(30):
            await replies.ended.wait()
        reader.close()


@pytest.mark.parametrize("path", ["/body", "/stream"])
async def test_little_is_kept_for_clients_that_do_not_read(path: str) -> None:
    replies, loop = Replies(), asyncio.get_running_loop()
    tracemalloc.start()
    async with served(replies, patience_s=60.0) as address:
        before = tracemalloc.get_traced_memory()[0]
        readers = [socket.socket() for _ in range(READERS)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            await loop.sock_connect(reader, address)
            await loop.sock_sendall(reader, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        seen = -1
        while seen != replies.streamed:  # until the sockets are full
            seen = replies.streamed
            await asyncio.sleep(0.5)
        assert tracemalloc.get_traced_memory()[0] - before < READERS * 4 * PIECE_BYTES
        tracemalloc.stop()
        for reader in readers:
            reader.close()


async def test_a_client_that_reads_gets_every_byte() -> None:
    async with served(Replies(), patience_s=60.0) as (host, port), httpx.AsyncClient() as client:
        assert (await client.get(f"http://{host}:{port}/body")).content == LARGE


async def test_a_client_that_leaves_is_noticed() -> None:
    replies = Replies()
    async with served(replies, patience_s=60.0) as (host, port), httpx.AsyncClient() as client:
        async with client.stream("GET", f"http://{host}:{port}/stream") as reply:
            await anext(reply.aiter_bytes())
        async with asyncio.timeout(30):
            await replies.ended.wait()


def test_the_proxies_have_it() -> None:
    assert SlowReaders in [each.cls for each in middlewares()]
