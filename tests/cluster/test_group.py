"""A group by itself, real actors and collectives, without Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from app.cluster.coordinators import Coordinators
from app.cluster.group import RankGroup
from app.engine.engine import Engine
from app.errors import DeadlineImpossibleError, GroupFailedError
from app.messages.conditioning import Conditioning
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL, execute, job, plans, random_conditioning
from tests.ranks import relative_error

SETTINGS = Settings(
    tensor_parallel_size=2, cpus_per_rank=0.1, threads_per_rank=1, magcache=MagCacheSettings(profile="flux.1-dev")
)


@pytest.fixture(scope="module")
def group(cluster: None) -> Iterator[RankGroup]:
    """The group of all tests here; the last one breaks it."""
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    replica = f"test-{bundles.id.hex()}"
    group = RankGroup.start(SETTINGS, bundles, replica, "own")
    asyncio.run(group.load(SETTINGS, replica, rebuilds=0))
    yield group
    group.kill()
    remove_placement_group(bundles)


@pytest.fixture
def conditioning() -> Conditioning:
    return random_conditioning()


# First, since the group has made no image yet.
async def test_the_very_first_deadline_is_judged_at_once(group: RankGroup, conditioning: Conditioning) -> None:
    with pytest.raises(DeadlineImpossibleError) as caught:
        await group.coordinator.denoise.remote(job("a/0", deadline_s=1e-3), [conditioning])
    assert caught.value.soonest_s > 1e-3
    gauges = await _gauges(group)
    assert gauges["flux_deadline_misses_total"] == 0
    # The warm-up is no traffic.
    assert gauges["flux_pictures_admitted_total"] == gauges["flux_running_pictures"] == 0


async def test_its_application_alone_finds_it(group: RankGroup) -> None:
    assert await Coordinators("own").call("ready") == [True]
    assert await Coordinators("another").call("ready") == []


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6},
        {"steps": 12, "magcache": MagCacheOptions()},
        {"steps": 12, "magcache": MagCacheOptions(computed_steps=6), "true_cfg_scale": 2.0},
    ],
)
async def test_two_ranks_equal_one_engine(group: RankGroup, options: dict[str, Any]) -> None:
    asked = job("a/0", **options)
    tensors = random_conditioning(asked)
    result = await group.coordinator.denoise.remote(asked, [ray.put(tensors)])
    expected = execute(Engine(MODEL), plans([asked]), {"a/0": tensors})["a/0"]
    assert relative_error(result.latents, expected) <= 1e-5
    assert len(result.report.schedule) == options["steps"]
    assert ("." in result.report.schedule) == ("magcache" in options)
    await group.check(timeout_s=60)


async def test_a_checkpoint_that_does_not_load_says_so(cluster: None) -> None:
    bundles = placement_group([{"CPU": 0.1}])
    missing = SETTINGS.model_copy(update={"model": "models/nothing", "tensor_parallel_size": 1})
    with pytest.raises(FileNotFoundError, match=r"models/nothing.*no model_index\.json"):
        await RankGroup.start(missing, bundles, "test").load(missing, "test", rebuilds=0)
    remove_placement_group(bundles)


async def test_a_call_that_is_cancelled_leaves_no_row(group: RankGroup, conditioning: Conditioning) -> None:
    """Ray cancels the call itself, not through `cancel`: images under way, and those that wait behind them."""
    reference = ray.put(conditioning)
    calls = [group.coordinator.denoise.remote(job(f"a/{i}", steps=400), [reference]) for i in range(10)]
    await _until(group, lambda running, waiting: running == 8)
    for call in calls:
        ray.cancel(call)
    await _until(group, lambda running, waiting: running == waiting == 0)
    await group.check(timeout_s=60)
    result = await group.coordinator.denoise.remote(job("b/0", steps=2), [reference])
    assert result.report.schedule == "CC"


async def test_large_latents_come_as_a_reference(group: RankGroup, conditioning: Conditioning) -> None:
    """From a rank's process through the coordinator's; 384x384 is the least square whose latents are large."""
    asked = job("large/0", size=(384, 384), steps=2)
    result = await group.coordinator.denoise.remote(asked, [conditioning])
    assert isinstance(result.latents, ray.ObjectRef)
    expected = execute(Engine(MODEL), plans([asked]), {"large/0": conditioning})["large/0"]
    assert relative_error(await result.latents, expected) <= 1e-5


async def test_a_rank_that_hangs_is_noticed(group: RankGroup) -> None:
    def collective(rank: Any) -> None:
        rank._engine.groups.tensor.sum(torch.ones(1))

    waits = group.ranks[0].__ray_call__.remote(collective)  # for rank 1
    with pytest.raises(TimeoutError):
        await group.check(timeout_s=1.0)
    await group.ranks[1].__ray_call__.remote(collective)
    await waits
    await group.check(timeout_s=60)


# Last, since the group is broken afterwards.
async def test_a_rank_with_another_history_ends_the_group(group: RankGroup, conditioning: Conditioning) -> None:
    await group.ranks[1].__ray_call__.remote(lambda rank: setattr(rank._engine, "_digest", "another"))
    with pytest.raises(GroupFailedError, match="PlanMismatchError"):
        await group.coordinator.denoise.remote(job("a/0", steps=6), [ray.put(conditioning)])
    with pytest.raises(GroupFailedError):
        await group.coordinator.ping.remote()
    samples = [s for family in await group.coordinator.metric_families.remote() for s in family.samples]
    assert sum(s.value for s in samples if s.name == "flux_digest_mismatches_total") == 1


async def _gauges(group: RankGroup) -> dict[str, float]:
    families = await group.coordinator.metric_families.remote()
    return {sample.name: sample.value for family in families for sample in family.samples}


async def _until(group: RankGroup, reached: Callable[[float, float], bool]) -> None:
    """Wait until the numbers of running and waiting images are ``reached``."""
    async with asyncio.timeout(60):
        while True:
            gauges = await _gauges(group)
            if reached(gauges["flux_running_pictures"], gauges["flux_waiting_pictures"]):
                return
            await asyncio.sleep(0.01)
