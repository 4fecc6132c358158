"""One tensor-parallel group: a coordinator and its ranks in the bundles of the replica's placement group."""

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.cluster.coordinator import Coordinator
from app.cluster.rank import Rank
from app.cluster.starting import StartReports, checkpoint_bytes, in_time, loaded
from app.control.admission import default_job
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.lora_names import Target

COORDINATOR_NAME = "flux-coordinator"


def namespace(application: str) -> str:
    """Ray's namespace of the coordinators of Serve's ``application``: a cluster may have several of this service."""
    return f"flux:{application}"


@dataclass(frozen=True)
class RankGroup:
    """Handles of a group. One that broke is killed whole and another takes its place: ranks share collectives."""

    coordinator: Any
    ranks: tuple[Any, ...]

    @classmethod
    def start(cls, settings: Settings, bundles: PlacementGroup, replica: str, application: str = "") -> "RankGroup":
        """Start the actors, without waiting for them: they import everything, and hold no model until `load`.

        Args:
            bundles: one bundle per rank; with ``spare_group`` two groups share them.
            replica: the replica's unique name; metrics carry it.
            application: Serve's name of the application, whose API processes are to find the coordinator.
        """
        groups = 2 if settings.spare_group else 1
        gpus = settings.gpus_per_rank if settings.device == "cuda" else 0
        # Ray types a call's result as the class, not as a handle with remote methods.
        rank_class: Any = ray.remote(Rank)
        coordinator_class: Any = ray.remote(Coordinator)
        ranks = tuple(
            rank_class.options(
                num_cpus=settings.cpus_per_rank / groups,
                num_gpus=gpus / groups,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            ).remote(settings, rank)
            for rank in range(settings.ranks)
        )
        coordinator = coordinator_class.options(
            # The names are how `Coordinators` finds it; the number keeps it apart from others of this replica.
            name=f"{COORDINATOR_NAME}:{replica}:{uuid.uuid4().hex[:8]}",
            namespace=namespace(application),
            num_cpus=0,
            max_concurrency=10_000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=0),
        ).remote(settings)
        return cls(coordinator, ranks)

    async def lora_targets(self) -> "dict[str, Target]":
        """What adapters may change in the model's transformer, once a rank's process has started."""
        known: dict[str, Target] = await self.ranks[0].lora_targets.remote()
        return known

    async def load(self, settings: Settings, replica: str, rebuilds: int, mismatches: int = 0) -> None:
        """Let the ranks meet, load and warm up, then have the coordinator lead them; kills all when that fails.

        Args:
            replica: the replica's unique name; metrics carry it.
            rebuilds: how many groups this replica had before.
            mismatches: how many of them ended because a rank had another history than its coordinator.

        Raises:
            ray.exceptions.RayError: an actor died, or the checkpoint cannot be loaded (the cause is in the message).
            GroupFailedError: a part has made no progress for ``start_timeout_s``.
        """
        coordinator, ranks = self.coordinator, self.ranks
        size, patience_s = settings.ranks, settings.start_timeout_s
        start = StartReports(coordinator, replica, size)
        try:
            start.enter("starting the ranks' processes")
            rendezvous = None
            if size > 1:
                rendezvous = await in_time(ranks[0].open_rendezvous.remote(), patience_s, "rank 0 starts")
            reports = [rank.load_and_report.options(num_returns="streaming").remote(rendezvous) for rank in ranks]
            start.enter("loading", await asyncio.to_thread(checkpoint_bytes, settings))
            await asyncio.gather(
                *(loaded(each, patience_s, f"rank {n} loads", partial(start.read, n)) for n, each in enumerate(reports))
            )
            start.enter("compiling and warming up" if settings.compile else "warming up")
            warm_ups = [rank.warm_up.remote(default_job(settings)) for rank in ranks]
            measured_times = await asyncio.gather(
                *(in_time(each, patience_s, f"rank {n} warms up") for n, each in enumerate(warm_ups))
            )
            attention = await in_time(ranks[0].attention.remote(), patience_s, "rank 0 names its attention backend")
            if size > 1:
                await in_time(ranks[0].close_rendezvous.remote(), patience_s, "rank 0 closes the rendezvous")
            leads = coordinator.lead.remote(ranks, measured_times, attention, replica, rebuilds, mismatches)
            await in_time(leads, patience_s, "the coordinator starts")
            await in_time(coordinator.ping.remote(), patience_s, "the coordinator reaches its ranks")
            coordinator.run.remote()
        except BaseException:
            self.kill()
            raise

    async def check(self, timeout_s: float) -> None:
        """Raise what is wrong when an actor is dead or hangs, or the coordinator failed; waits for plans under way.

        Raises:
            TimeoutError: after ``timeout_s`` some rank still has not done what was sent to it before.
        """
        async with asyncio.timeout(timeout_s):
            await self.coordinator.ping.remote()

    def kill(self) -> None:
        """End all actors of the group, whatever state they are in (a rank may hang in a collective)."""
        for actor in (self.coordinator, *self.ranks):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
