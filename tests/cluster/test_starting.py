"""A start that makes no progress is given up, and one that is only slow is not."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.cluster.group import RankGroup
from app.cluster.rank import Rank
from app.cluster.starting import PROGRESS_BYTES, StartReports, checkpoint_bytes, in_time, loaded
from app.errors import GroupFailedError
from app.messages.results import GroupStart
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL
from tests.patience import wait_for

SETTINGS = Settings(
    tensor_parallel_size=2, cpus_per_rank=0.1, threads_per_rank=1, magcache=MagCacheSettings(profile="flux.1-dev")
)
PATIENCE_S = 1.0


async def _reports(step: int) -> AsyncIterator[Awaitable[int]]:
    """Reports of a rank that moves ``step`` bytes between two of them, over more than the patience."""
    for number in range(10):
        await asyncio.sleep(PATIENCE_S / 5)
        report: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        report.set_result(number * step)
        yield report


async def test_slow_is_not_hanging() -> None:
    await loaded(_reports(PROGRESS_BYTES), PATIENCE_S, "rank 0 loads")


async def test_it_tells_what_moved_since_loading_began() -> None:
    told: list[int] = []
    await loaded(_reports(PROGRESS_BYTES), PATIENCE_S, "rank 0 loads", told.append)
    assert told == [number * PROGRESS_BYTES for number in range(10)]


def test_what_the_coordinator_is_told() -> None:
    class Coordinator:
        told: ClassVar[list[GroupStart]] = []
        report_start = SimpleNamespace(remote=told.append)

    reports = StartReports(Coordinator, "r0", ranks=2)
    reports.enter("starting")
    reports.enter("loading", checkpoint_bytes(SETTINGS))
    reports.read(1, 5)
    reports.enter("warming up")
    size = (MODEL / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert Coordinator.told == [
        GroupStart("r0", "starting", (0, 0)),
        GroupStart("r0", "loading", (0, 0), size),
        GroupStart("r0", "loading", (0, 5), size),
        GroupStart("r0", "warming up", (0, 5), size),
    ]


async def test_a_few_bytes_are_no_progress() -> None:
    with pytest.raises(GroupFailedError, match="rank 0 loads: no progress for start_timeout_s, 1 s"):
        await loaded(_reports(8), PATIENCE_S, "rank 0 loads")


async def test_a_call_without_an_answer_is_given_up() -> None:
    with pytest.raises(GroupFailedError, match=r"rank 1 warms up: no progress for start_timeout_s, 0\.01 s"):
        await in_time(asyncio.Event().wait(), 0.01, "rank 1 warms up")


def test_a_loading_rank_tells_the_bytes_that_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cluster.rank.REPORT_S", 0.001)
    rank = Rank(SETTINGS.model_copy(update={"tensor_parallel_size": 1}), 0)
    reports = list(rank.load_and_report(None))
    assert reports == sorted(reports)
    weights = SETTINGS.model + "/transformer/diffusion_pytorch_model.safetensors"
    with open(weights, "rb") as file:
        assert reports[-1] - reports[0] > 0.5 * file.seek(0, 2)
    rank.ping()


async def test_a_start_in_too_little_time_is_given_up_whole(cluster: None) -> None:
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    impatient = SETTINGS.model_copy(update={"start_timeout_s": 0.01})
    with pytest.raises(GroupFailedError, match="rank 0 starts: no progress for start_timeout_s"):
        await RankGroup.start(impatient, bundles, "impatient").load(impatient, "impatient", rebuilds=0)
    remove_placement_group(bundles)


async def test_a_rank_that_stops_while_it_loads_is_given_up(cluster: None) -> None:
    """And it can be replaced, though a stopped process hears of no call."""
    place = placement_group([{"CPU": 0.1}])
    rank_class = ray.remote(Rank).options(
        num_cpus=0.1,
        scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0),
    )
    alone = SETTINGS.model_copy(update={"tensor_parallel_size": 1})
    rank: Any = rank_class.remote(alone, 0)
    pid = await rank.__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(GroupFailedError, match="rank 0 loads: no progress for start_timeout_s, 1 s"):
        await loaded(rank.load_and_report.options(num_returns="streaming").remote(None), PATIENCE_S, "rank 0 loads")
    ray.kill(rank)
    another: Any = rank_class.remote(alone, 0)  # there is room for one
    await loaded(another.load_and_report.options(num_returns="streaming").remote(None), 400.0, "rank 0 loads")
    ray.kill(another)
    remove_placement_group(place)


STOPPED = {"rank 0": "rank 0 starts", "rank 1": "rank [01] loads", "coordinator": "the coordinator starts"}
"""What is stopped, and what is then said to make no progress."""


@pytest.mark.faults
async def test_whatever_stops_before_the_start_is_over_ends_it(cluster: None) -> None:
    """Three groups at once, since each takes its whole time limit."""
    impatient = SETTINGS.model_copy(update={"start_timeout_s": 30.0})
    places = [placement_group([{"CPU": 0.1}, {"CPU": 0.1}]) for _ in STOPPED]
    groups = [RankGroup.start(impatient, place, f"stopped {at}") for at, place in zip(STOPPED, places, strict=True)]
    actors = [{"rank 0": one.ranks[0], "rank 1": one.ranks[1], "coordinator": one.coordinator} for one in groups]
    pids = [
        {name: await actor.__ray_call__.remote(lambda _: os.getpid()) for name, actor in of.items()} for of in actors
    ]
    for victim, of in zip(STOPPED, pids, strict=True):
        os.kill(of[victim], signal.SIGSTOP)
    starts = [one.load(impatient, f"stopped {at}", rebuilds=0) for at, one in zip(STOPPED, groups, strict=True)]
    for doing, error in zip(STOPPED.values(), await asyncio.gather(*starts, return_exceptions=True), strict=True):
        assert isinstance(error, GroupFailedError), error
        assert re.search(f"{doing}: no progress for start_timeout_s, 30 s", str(error))
    left = [pid for of in pids for pid in of.values()]
    wait_for(lambda: not any(map(psutil.pid_exists, left)), "all its processes are gone")
    for place in places:
        remove_placement_group(place)


@pytest.mark.faults
async def test_a_rank_that_hangs_in_its_warm_up_is_given_up(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the coordinator says how far the group is."""
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    impatient = SETTINGS.model_copy(update={"start_timeout_s": 30.0})
    group = RankGroup.start(impatient, bundles, "hanging")

    async def loaded_and_then_busy(*arguments: Any) -> None:
        await loaded(*arguments)
        group.ranks[1].__ray_call__.remote(lambda _: time.sleep(600))  # before its warm-up

    monkeypatch.setattr("app.cluster.group.loaded", loaded_and_then_busy)
    assert await group.coordinator.starting.remote() is None, "a spare says nothing"
    start = asyncio.create_task(group.load(impatient, "hanging", rebuilds=0))
    async with asyncio.timeout(300):
        while not ((told := await group.coordinator.starting.remote()) and told.phase == "warming up"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert min(told.read_bytes) > 0.5 * told.checkpoint_bytes / 2 > 0
    with pytest.raises(GroupFailedError, match=r"rank [01] warms up: no progress for start_timeout_s, 30 s"):
        await start
    remove_placement_group(bundles)
