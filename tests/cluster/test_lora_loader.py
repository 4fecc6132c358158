"""Ranks load adapters before an image joins; they are simulated, since each load ends when the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import ray
from prometheus_client import CollectorRegistry
from ray.actor import ActorHandle

from app.cluster import lora_loader
from app.cluster.lora_loader import LoraLoader
from app.control.counters import CoordinatorCounters
from app.engine.lora_names import LoraError
from app.errors import DeadlinePassedError, GroupFailedError, InvalidRequestError, RequestCancelledError
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraUse
from app.metrics import CoordinatorMetrics


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are asked at each turn of the event loop, so that `settle` is a matter of turns and not of time."""
    monkeypatch.setattr(lora_loader, "POLL_S", 0.0)


class Remote:
    """A method of an actor's handle."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class SimulatedRank:
    """Notes what it is told; a load takes until its name is in ``ready``, and ends with the error in ``errors``."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.errors: dict[str, Exception] = {}
        self.held: list[str] = []
        self.told: list[str] = []
        self.load_lora = Remote(self._load)
        self.drop_lora = Remote(self._drop)

    async def _load(self, name: str, digest: str) -> bool:
        if name in self.errors:
            raise self.errors[name]
        if name in self.ready and name not in self.held:
            self.held.append(name)
            self.told.append(f"load {name}")
        return name in self.held

    async def _drop(self, name: str, digest: str) -> None:
        self.told.append(f"drop {name}")
        if name in self.held:
            self.held.remove(name)


class Group:
    """A loader over two simulated ranks."""

    def __init__(self, limit_bytes: int = 100, timeout_s: float = 60.0) -> None:
        self.ranks = [SimulatedRank(), SimulatedRank()]
        self.registry = CollectorRegistry()
        metrics = CoordinatorMetrics(self.registry, "m", "r", CoordinatorCounters())
        self.loader = LoraLoader(cast(list[ActorHandle], self.ranks), limit_bytes, timeout_s, metrics)

    def ready(self, *names: str) -> None:
        for rank in self.ranks:
            rank.ready |= set(names)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model": "m", "replica": "r", **labels})


@asynccontextmanager
async def running(group: Group) -> AsyncIterator[Group]:
    loop = asyncio.create_task(group.loader.run())
    try:
        yield group
    finally:
        loop.cancel()
        await asyncio.wait({loop})


def job(row_id: str, *names: str, nbytes: int = 10, deadline_s: float | None = None) -> DenoiseJob:
    loras = tuple(LoraUse(name, 1.0, "d", nbytes) for name in names)
    return DenoiseJob(row_id, 64, 64, 4, 3.5, 1.0, 0, deadline_s=deadline_s, loras=loras, request_id=row_id)


class Image:
    """An image that holds its adapters until it is told to end."""

    def __init__(self, loader: LoraLoader, wanted: DenoiseJob) -> None:
        self.joined: DenoiseJob | None = None
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(loader, wanted))

    async def _run(self, loader: LoraLoader, wanted: DenoiseJob) -> None:
        async with loader.ready(wanted) as joined:
            self.joined = joined
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def settle() -> None:
    """All that can happen without another word from the test."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_an_image_without_adapters_waits_for_none() -> None:
    group = Group()  # whose loop does not even run
    image = Image(group.loader, job("r"))
    await asyncio.sleep(0)
    await image.end()
    assert image.joined == job("r")


async def test_an_image_joins_when_all_ranks_hold_its_adapters() -> None:
    async with running(Group()) as group:
        image = Image(group.loader, job("r", "a", "b"))
        group.ready("a")
        group.ranks[0].ready.add("b")
        await settle()
        assert image.joined is None
        group.ready("b")
        await settle()
        assert image.joined == job("r", "a", "b")
        assert group.metric("flux_lora_loads_total", result="loaded") == 2
        assert group.metric("flux_lora_bytes") == 20
        await image.end()


async def test_images_share_a_load() -> None:
    async with running(Group()) as group:
        images = [Image(group.loader, job(f"r{number}", "a")) for number in range(3)]
        await settle()
        group.ready("a")
        await settle()
        assert all(image.joined for image in images)
        assert group.ranks[0].told == ["load a"]
        for image in images:
            await image.end()


async def test_an_image_that_leaves_does_not_end_the_load_that_others_wait_for() -> None:
    async with running(Group()) as group:
        leaves, stays = (Image(group.loader, job(row_id, "a")) for row_id in ("leaves", "stays"))
        await settle()
        leaves.task.cancel()
        group.ready("a")
        await settle()
        assert leaves.task.cancelled()
        assert stays.joined
        await stays.end()


async def test_a_failed_load_ends_its_images_only_and_is_tried_again() -> None:
    async with running(Group()) as group:
        group.ready("a", "b")
        reason = LoraError("a.safetensors was replaced since it was listed")
        group.ranks[1].errors["a"] = ray.exceptions.RayTaskError("load_lora", "trace", reason)
        failed = [Image(group.loader, job("r0", "a")), Image(group.loader, job("r1", "b", "a"))]
        works = Image(group.loader, job("r2", "b"))
        await settle()
        for image in failed:
            with pytest.raises(
                InvalidRequestError, match=r"'a' cannot be loaded: a\.safetensors was replaced"
            ) as error:
                await image.task
            assert (error.value.status, error.value.code, error.value.param) == (409, "lora_unusable", "lora")
        assert works.joined
        assert [rank.held for rank in group.ranks] == [["b"], ["b"]]
        assert group.metric("flux_lora_loads_total", result="failed") == 1
        del group.ranks[1].errors["a"]
        again = Image(group.loader, job("r3", "a"))
        await settle()
        assert again.joined
        await again.end()
        await works.end()


async def test_a_load_that_takes_too_long_fails() -> None:
    async with running(Group(timeout_s=0.05)) as group:
        image = Image(group.loader, job("r", "a"))
        with pytest.raises(InvalidRequestError, match=r"not within 0\.05 s"):
            await image.task


async def test_a_rank_that_dies_ends_the_loop_so_that_the_group_fails() -> None:
    group = Group()
    group.ranks[0].errors["a"] = ray.exceptions.RayActorError()
    image = Image(group.loader, job("r", "a"))
    with pytest.raises(ray.exceptions.RayActorError):
        await group.loader.run()
    group.loader.fail(GroupFailedError("a rank died"))
    for waiting in (image, Image(group.loader, job("r2", "b"))):
        with pytest.raises(GroupFailedError, match="a rank died"):
            await waiting.task


async def test_adapters_that_do_not_fit_wait_and_come_in_turn() -> None:
    async with running(Group(limit_bytes=20)) as group:
        group.ready("a", "b", "c")
        first = Image(group.loader, job("r0", "a", nbytes=15))
        await settle()
        large, small = Image(group.loader, job("r1", "b", nbytes=15)), Image(group.loader, job("r2", "c", nbytes=5))
        await settle()
        assert (large.joined, small.joined) == (None, None)  # the small one would fit, and overtakes nothing
        await first.end()
        await settle()
        assert large.joined
        assert small.joined
        assert group.ranks[0].told == ["load a", "drop a", "load b", "load c"]
        await large.end()
        await small.end()


async def test_one_wanted_again_before_it_was_dropped_is_there() -> None:
    group = Group(limit_bytes=10)
    group.ready("a", "b")
    for row_id, name in (("r0", "a"), ("r1", "b")):
        left = Image(group.loader, job(row_id, name))
        await settle()
        left.task.cancel()
        await asyncio.wait({left.task})
    again = Image(group.loader, job("r2", "a"))
    await settle()  # until here the loop did not run: three orders wait for it
    async with running(group):
        await settle()
        assert again.joined
        assert [rank.told for rank in group.ranks] == [["drop a", "drop b", "load a"]] * 2
        await again.end()


async def test_an_image_that_waits_can_be_cancelled() -> None:
    async with running(Group()) as group:
        cancelled, ended = Image(group.loader, job("r0", "a")), Image(group.loader, job("r1", "a"))
        await settle()
        assert [one.row_id for one in group.loader.waiting] == ["r0", "r1"]
        group.loader.end("r0")
        group.loader.end("r1", RequestCancelledError("request r1 was cancelled"))
        group.loader.end("unknown")
        await settle()
        assert cancelled.task.cancelled()
        with pytest.raises(RequestCancelledError):
            await ended.task
        assert group.loader.waiting == []


async def test_a_deadline_counts_the_load() -> None:
    async with running(Group()) as group:
        late = Image(group.loader, job("r0", "a", deadline_s=0.05))
        in_time = Image(group.loader, job("r1", "a", deadline_s=100.0))
        with pytest.raises(DeadlinePassedError, match="adapters"):
            await late.task
        group.ready("a")
        await settle()
        assert in_time.joined is not None
        assert in_time.joined.deadline_s is not None
        assert 50 < in_time.joined.deadline_s < 100
        await in_time.end()
