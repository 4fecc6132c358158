"""One tensor-parallel group: a coordinator and its ranks in the bundles of the replica's placement group."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.cluster.coordinator import Coordinator
from app.cluster.rank import Rank
from app.cluster.starting import in_time, loaded
from app.control.admission import default_job
from app.settings import Settings

COORDINATOR_NAME = "flux-coordinator"
NAMESPACE = "flux"


@dataclass(frozen=True)
class RankGroup:
    """Handles of a running group. A group that broke is killed whole and built again: ranks share collectives."""

    coordinator: Any
    ranks: tuple[Any, ...]

    @classmethod
    async def build(
        cls, settings: Settings, bundles: PlacementGroup, replica: str, rebuilds: int, mismatches: int = 0
    ) -> "RankGroup":
        """Start the actors, let the ranks meet, load and warm up, then start the coordinator.

        Args:
            bundles: one bundle per rank.
            replica: the replica's unique name; metrics carry it.
            rebuilds: how many groups this replica had before.
            mismatches: how many of them ended because a rank had another history than its coordinator.

        Raises:
            ray.exceptions.RayError: an actor died, or the checkpoint cannot be loaded (the cause is in the message).
            GroupFailedError: a part has made no progress for ``start_timeout_s``.
        """
        size, patience_s = settings.ranks, settings.start_timeout_s
        gpus = settings.gpus_per_rank if settings.device == "cuda" else 0
        # Ray types a call's result as the class, not as a handle with remote methods.
        rank_class: Any = ray.remote(Rank)
        coordinator_class: Any = ray.remote(Coordinator)
        ranks = tuple(
            rank_class.options(
                num_cpus=settings.cpus_per_rank,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            ).remote(settings, rank)
            for rank in range(size)
        )
        coordinator: Any = None
        try:
            rendezvous = None
            if size > 1:
                rendezvous = await in_time(ranks[0].open_rendezvous.remote(), patience_s, "rank 0 starts")
            reports = [rank.load_and_report.options(num_returns="streaming").remote(rendezvous) for rank in ranks]
            await asyncio.gather(*(loaded(each, patience_s, f"rank {n} loads") for n, each in enumerate(reports)))
            warm_ups = [rank.warm_up.remote(default_job(settings)) for rank in ranks]
            measured_times = await asyncio.gather(
                *(in_time(each, patience_s, f"rank {n} warms up") for n, each in enumerate(warm_ups))
            )
            if size > 1:
                await in_time(ranks[0].close_rendezvous.remote(), patience_s, "rank 0 closes the rendezvous")
            coordinator = coordinator_class.options(
                # The name is how /metrics finds it; the count keeps it apart from a predecessor still ending.
                name=f"{COORDINATOR_NAME}:{replica}:{rebuilds}",
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=10_000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=0),
            ).remote(settings, ranks, measured_times, replica, rebuilds, mismatches)
            await in_time(coordinator.ping.remote(), patience_s, "the coordinator starts")
            coordinator.run.remote()
        except BaseException:
            _kill((*ranks, coordinator) if coordinator else ranks)
            raise
        return cls(coordinator, ranks)

    async def check(self, timeout_s: float) -> None:
        """Raise what is wrong when an actor is dead or hangs, or the coordinator failed; waits for plans under way.

        Raises:
            TimeoutError: after ``timeout_s`` some rank still has not done what was sent to it before.
        """
        async with asyncio.timeout(timeout_s):
            await self.coordinator.ping.remote()

    def kill(self) -> None:
        """End all actors of the group, whatever state they are in (a rank may hang in a collective)."""
        _kill((self.coordinator, *self.ranks))


def _kill(actors: tuple[Any, ...]) -> None:
    for actor in actors:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor)
