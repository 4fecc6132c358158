"""Calls through Serve's handles end with the tasks that await them."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.cluster import handles
from app.cluster.handles import TRIES, DeploymentProxy, answers_of_all, items_of, repeated, result_of
from app.errors import UnavailableError


class Part:
    """Answers, and tells when a call has begun and when it was ended early."""

    def __init__(self) -> None:
        self._events: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def until(self, event: str) -> None:
        await self._events[event].wait()

    async def double(self, value: int) -> int:
        return 2 * value

    async def hang(self) -> None:
        self._events["hangs"].set()
        try:
            await asyncio.Event().wait()
        finally:
            self._events["hung"].set()

    async def count(self, to: int) -> AsyncGenerator[int, None]:
        number = 0
        try:
            while number < to:
                yield number
                number += 1
                await asyncio.sleep(0)
        finally:
            self._events["counted" if number == to else "cut short"].set()


@pytest.fixture
def handle(service: str) -> Iterator[DeploymentHandle]:
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=0.1)(Part)
    yield serve.run(deployment.bind(), name="part", route_prefix=None)
    serve.delete("part")


async def test_a_call_ends_with_what_awaits_it(handle: DeploymentHandle) -> None:
    part = DeploymentProxy(handle)
    async with asyncio.timeout(60):
        assert await part.double(21) == 42

        task = asyncio.create_task(result_of(handle.hang.remote()))
        await part.until("hangs")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await part.until("hung")

        streaming = handle.options(stream=True).count
        assert [number async for number in items_of(streaming.remote(3))] == [0, 1, 2]
        await part.until("counted")
        endless = items_of(streaming.remote(10**9))
        assert await anext(endless) == 0
        await endless.aclose()
        await part.until("cut short")


class Named:
    """Says which process it is."""

    async def name(self) -> int:
        return os.getpid()


async def test_all_processes_of_a_part_are_asked(service: str) -> None:
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0}, num_replicas=2)(Named)
    twins = serve.run(deployment.bind(), name="twins", route_prefix=None)
    assert len(set(await answers_of_all(twins, "name"))) == 2
    serve.delete("twins")


async def test_a_call_whose_process_dies_is_made_again_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BETWEEN_TRIES_S", 0.0)
    deaths = iter(range(TRIES - 1))

    async def call() -> str:
        if next(deaths, None) is not None:
            raise ray.exceptions.ActorDiedError
        return "done"

    assert await repeated(call) == "done"
    deaths = iter(range(TRIES))
    with pytest.raises(UnavailableError, match=f"died {TRIES} times on this request"):
        await repeated(call)
