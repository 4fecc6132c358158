"""A group by itself, real actors and collectives, without Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from app.cluster.group import RankGroup
from app.engine.engine import Engine
from app.errors import DeadlineImpossibleError, GroupFailedError
from app.messages import (
    BranchStep,
    Conditioning,
    PromptEmbeddings,
    RowStep,
    StepPlan,
    chained,
)
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL, execute, job, plans

SETTINGS = Settings(
    tensor_parallel_size=2, cpus_per_rank=0.1, threads_per_rank=1, magcache=MagCacheSettings(profile="flux.1-dev")
)


@pytest.fixture
async def group(cluster: None) -> AsyncIterator[RankGroup]:
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    built = await RankGroup.build(SETTINGS, bundles, "test", rebuilds=0)
    yield built
    built.kill()
    remove_placement_group(bundles)


@pytest.fixture
def conditioning() -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    return Conditioning(
        PromptEmbeddings(torch.randn(32, 128, generator=generator), torch.randn(128, generator=generator))
    )


async def test_two_ranks_equal_one_engine(group: RankGroup, conditioning: Conditioning) -> None:
    asked = job("a/0", steps=6)
    result = await group.coordinator.denoise.remote(asked, [ray.put(conditioning)])
    expected = execute(Engine(MODEL), plans([asked]), {"a/0": conditioning})["a/0"]
    assert (result.latents - expected).norm() / expected.norm() <= 1e-5
    assert result.report.schedule == "CCCCCC"
    await group.check(timeout_s=60)


async def test_the_very_first_deadline_is_judged_at_once(group: RankGroup, conditioning: Conditioning) -> None:
    with pytest.raises(DeadlineImpossibleError) as caught:
        await group.coordinator.denoise.remote(job("a/0", deadline_s=1e-3), [conditioning])
    assert caught.value.soonest_s > 1e-3
    gauges = await _gauges(group)
    assert gauges["flux_deadline_misses_total"] == 0
    # The rehearsal is no traffic.
    assert gauges["flux_pictures_admitted_total"] == gauges["flux_running_pictures"] == 0


async def test_a_rank_with_another_history_ends_the_group(group: RankGroup, conditioning: Conditioning) -> None:
    stray = chained([StepPlan(0, "", drop=("nobody/0",))])
    await group.ranks[1].execute.remote(stray)
    with pytest.raises(GroupFailedError, match="PlanMismatchError"):
        await group.coordinator.denoise.remote(job("a/0", steps=6), [ray.put(conditioning)])
    with pytest.raises(GroupFailedError):
        await group.coordinator.ping.remote()
    samples = [s for family in await group.coordinator.metric_families.remote() for s in family.samples]
    assert sum(s.value for s in samples if s.name == "flux_digest_mismatches_total") == 1


async def test_a_checkpoint_that_does_not_load_says_so(cluster: None) -> None:
    bundles = placement_group([{"CPU": 0.1}])
    missing = SETTINGS.model_copy(update={"model": "models/nothing", "tensor_parallel_size": 1})
    with pytest.raises(FileNotFoundError, match=r"models/nothing.*no model_index\.json"):
        await RankGroup.build(missing, bundles, "test", rebuilds=0)
    remove_placement_group(bundles)


async def test_a_call_that_is_cancelled_leaves_no_row(group: RankGroup, conditioning: Conditioning) -> None:
    """Ray cancels the call itself, not through `cancel`: one image under way, and those that wait behind it."""
    reference = ray.put(conditioning)
    calls = [group.coordinator.denoise.remote(job(f"a/{i}", steps=400), [reference]) for i in range(10)]
    while (await _gauges(group))["flux_running_pictures"] < 8:
        pass
    for call in calls:
        ray.cancel(call)
    while await _images_known(group):
        pass
    await group.check(timeout_s=60)
    result = await group.coordinator.denoise.remote(job("b/0", steps=2), [reference])
    assert result.report.schedule == "CC"


async def test_a_rank_that_hangs_is_noticed(group: RankGroup, conditioning: Conditioning) -> None:
    # Rank 0 alone enters the collectives, and waits there for rank 1.
    step = RowStep("a/0", 0, (BranchStep("cond", True),))
    formed = chained([StepPlan(0, "", (job("a/0"),), (step,))])
    group.ranks[0].execute.remote(formed, conditioning)
    with pytest.raises(TimeoutError):
        await group.check(timeout_s=2.0)


async def _gauges(group: RankGroup) -> dict[str, float]:
    families = await group.coordinator.metric_families.remote()
    return {sample.name: sample.value for family in families for sample in family.samples}


async def _images_known(group: RankGroup) -> float:
    gauges = await _gauges(group)
    return gauges["flux_running_pictures"] + gauges["flux_waiting_pictures"]
