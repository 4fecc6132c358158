"""The replica: supervises one tensor-parallel group, rebuilds it when it breaks, and loses no image over it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from app.cluster.by_reference import by_reference
from app.cluster.client_errors import public_reason
from app.cluster.group import RankGroup
from app.cluster.shared_images import Emit, SharedImages
from app.cluster.starting import StartReports
from app.control.reservations import Reservations
from app.engine.families import Family
from app.errors import DeadlinePassedError, GroupFailedError, HistoryMismatchError, UnavailableError
from app.logs import configure_logging
from app.lora_folder import read_listing
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraListing
from app.messages.repetitions import Reservation
from app.messages.results import DenoiseResult, Progress
from app.model_files import fetch_and_check
from app.settings import Settings
from app.telemetry import REQUEST_ID

if TYPE_CHECKING:
    from app.engine.lora_names import Target

logger = logging.getLogger(__name__)

WATCH_SECONDS = 2.0
"""How often an idle group is looked at, so that a killed rank is replaced before the next request needs it."""
REPLACED_S = 30.0
"""About what Serve takes to notice that a replica has given up, and to start another."""


class FluxReplica:
    """One tensor-parallel group behind Serve's routing, queueing and health checks."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, checked: str | None = None
    ) -> None:
        """Start the group.

        Args:
            checked: see `fetch_and_check`.
        """
        configure_logging(settings)
        self._settings = settings
        self._lora_targets: dict[str, Target] = {}
        self._rebuilds = 0
        self._mismatches = 0
        self._failure: GroupFailedError | None = None
        self._trouble: str | None = None
        self._reports: asyncio.Queue[tuple[RankGroup, Exception]] = asyncio.Queue()
        self._settled = asyncio.Condition()
        self._images = SharedImages(settings.idempotency_s)
        self._reservations = Reservations(settings.idempotency_s, time.monotonic)
        context = serve.get_replica_context()
        self._application, self._replica = context.app_name, context.replica_id.unique_id
        self._bundles = ray.util.get_current_placement_group()
        self._spare: RankGroup | None = self._start()  # its processes import while the checkpoint is checked
        StartReports(self._spare.coordinator, self._replica, settings.ranks).enter(
            "fetching or checking the checkpoint"
        )
        self._family = await asyncio.to_thread(fetch_and_check, settings, checked)
        listing = asyncio.create_task(self._list_loras(self._spare))
        self._group = await self._build()
        self._loras = await listing
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._look())]

    async def family(self) -> Family:
        """What kind of model is served, as the checkpoint says."""
        return self._family

    async def loras(self) -> LoraListing:
        """The adapters that requests may name."""
        return self._loras

    async def reload_loras(self) -> LoraListing:
        """Read the folder of adapters again; images under way keep theirs.

        Raises:
            UnavailableError: the folder is gone; the listing stays as it is.
        """
        try:
            self._loras = await asyncio.to_thread(read_listing, self._settings, self._lora_targets)
        except FileNotFoundError as error:
            raise UnavailableError(str(error)) from error
        return self._loras

    async def _list_loras(self, group: RankGroup) -> LoraListing:
        if self._settings.loras is not None:
            self._lora_targets = await group.lora_targets()
        return await asyncio.to_thread(read_listing, self._settings, self._lora_targets)

    async def check(self, job: DenoiseJob) -> None:
        """Raise what `denoise` would raise at once for want of room or time; while the group is rebuilt, nothing."""
        with contextlib.suppress(GroupFailedError, ray.exceptions.RayActorError):
            await self._group.coordinator.check.remote(job)

    async def trouble(self) -> str | None:
        """Why the group cannot make images at the moment, in words for clients; None when it can."""
        return self._trouble

    async def denoise(self, job: DenoiseJob, conditioning: Conditioning) -> DenoiseResult:
        """Denoise one image; a group that breaks meanwhile is rebuilt and the image made again (same seed).

        Raises:
            UnavailableError: the group broke again and again while it made this image, or cannot be rebuilt.
            DeadlinePassedError: the deadline passed while the group was rebuilt.
        """
        *_, result = [item async for item in self.stream_denoise(job, conditioning, None)]
        assert isinstance(result, DenoiseResult), "the last item is the result"
        return result

    async def stream_denoise(
        self, job: DenoiseJob, conditioning: Conditioning, progress: bool | None
    ) -> AsyncGenerator[list[Progress] | DenoiseResult, None]:
        """`denoise` with events on the way; the last item is the result.

        An image that is made again after a rebuild begins at step 0 once more. One that is here already, for the same
        request, is joined.

        Args:
            progress: see `Coordinator.stream`; None has no events.
        """
        self._raise_if_given_up()
        image = self._images.join_or_start(job, partial(self._make, job, by_reference(conditioning), progress))
        async with aclosing(image.items(job.row_id)) as items:
            async for item in items:
                yield item

    # What a repetition asks of all replicas; see `Repeats`.

    async def reserve(self, scope: str, offered: Reservation) -> Reservation:
        """The request that has ``scope`` here; ``offered`` where there is none."""
        return self._reservations.reserve(scope, offered, self._images.tokens())

    async def orphans(self, body: str, living: set[str]) -> list[Reservation]:
        """See `SharedImages.orphans`."""
        return self._images.orphans(body, living)

    async def claim(self, token: str, living: set[str], process: str) -> bool:
        """See `SharedImages.claim`."""
        return self._images.claim(token, living, process)

    async def follow(self, image: str, follower: str) -> list[Progress] | DenoiseResult | None:
        """News of an image, or its result; None where it is not here."""
        known = self._images.get(image)
        return None if known is None else await known.next(follower)

    async def unfollow(self, image: str, follower: str) -> None:
        """``follower`` waits no longer."""
        known = self._images.get(image)
        if known is not None:
            known.leave(follower)

    async def _make(self, job: DenoiseJob, tensors: Any, progress: bool | None, emit: Emit) -> DenoiseResult:
        REQUEST_ID.set(job.request_id)
        came, asking = time.monotonic(), job
        for _ in range(self._settings.rebuild_attempts + 1):
            group = self._group
            try:
                async for item in _items(group.coordinator, asking, tensors, progress):
                    if isinstance(item, DenoiseResult):
                        return item
                    emit(item)
            except asyncio.CancelledError:
                group.coordinator.cancel.remote(job.row_id)
                raise
            except (GroupFailedError, ray.exceptions.RayActorError) as error:
                logger.warning("request %s: %s is made again: %s", job.request_id, job.row_id, error)
                await self._replaced(group, error)
                asking = _with_time_left(job, time.monotonic() - came)
        raise UnavailableError(
            f"the tensor-parallel group failed {self._settings.rebuild_attempts + 1} times on this request; ask again"
        )

    async def _replaced(self, broken: RankGroup, error: Exception) -> None:
        """Report ``broken`` and wait until there is another group, or never will be."""
        self._reports.put_nowait((broken, error))
        async with self._settled:
            await self._settled.wait_for(lambda: self._group is not broken or self._failure is not None)
        self._raise_if_given_up()

    def _raise_if_given_up(self) -> None:
        if self._failure is not None:
            raise UnavailableError(f"{self._failure}; ask again", REPLACED_S)

    def check_health(self) -> None:
        """For Serve, which replaces a replica whose group cannot be rebuilt."""
        if self._failure is not None:
            raise self._failure

    async def _watch(self) -> None:
        """Rebuild the group when a request or a look reports it broken.

        Only this task builds: what a request's own call starts, Ray cancels with the request.
        """
        while self._failure is None:
            broken, error = await self._reports.get()
            if broken is self._group:
                await self._rebuild(error)

    async def _look(self) -> None:
        """Report the group when it is dead or hangs. A look waits for the ranks' work; requests report meanwhile."""
        while self._failure is None:
            await asyncio.sleep(WATCH_SECONDS)
            group, limit_s = self._group, self._settings.hang_timeout_s
            try:
                await group.check(limit_s)
            except TimeoutError:
                hang = GroupFailedError(f"a rank or the coordinator has not answered for hang_timeout_s, {limit_s:g} s")
                self._reports.put_nowait((group, hang))
            except (GroupFailedError, ray.exceptions.RayActorError) as error:
                self._reports.put_nowait((group, error))

    async def _rebuild(self, error: Exception) -> None:
        logger.error("rebuilding the tensor-parallel group: %s", error)
        self._mismatches += isinstance(error, HistoryMismatchError)
        self._group.kill()
        attempts = self._settings.rebuild_attempts
        for attempt in range(1, attempts + 1):
            self._rebuilds += 1
            self._trouble = f"rebuild {attempt} of {attempts} is under way: {public_reason(error)}"
            try:
                self._group = await self._build()
                self._trouble = None
                break
            except Exception as failure:  # whatever it is, the calls that wait for a group must end
                logger.error("rebuild %d of %d failed: %s", attempt, attempts, failure)
                error = failure
        else:
            self._trouble = f"the tensor-parallel group cannot be rebuilt: {public_reason(error)}"
            self._failure = GroupFailedError(self._trouble)
        async with self._settled:
            self._settled.notify_all()

    async def _build(self) -> RankGroup:
        group, self._spare = self._spare or self._start(), None
        await group.load(self._settings, self._replica, self._rebuilds, self._mismatches)
        if self._settings.spare_group:
            self._spare = self._start()
        return group

    def _start(self) -> RankGroup:
        assert self._bundles is not None, "Serve gives every replica the placement group that build() asks for"
        return RankGroup.start(self._settings, self._bundles, self._replica, self._application)


async def _items(coordinator: Any, job: DenoiseJob, tensors: Any, progress: bool | None) -> AsyncGenerator[Any, None]:
    if progress is None:
        yield await coordinator.denoise.remote(job, [tensors])
        return
    async for item in coordinator.stream.options(num_returns="streaming").remote(job, [tensors], progress):
        yield await item


def _with_time_left(job: DenoiseJob, spent_s: float) -> DenoiseJob:
    """``job`` with what is left of its deadline."""
    if job.deadline_s is None:
        return job
    if spent_s >= job.deadline_s:
        raise DeadlinePassedError("the deadline passed while the tensor-parallel group was rebuilt")
    return replace(job, deadline_s=job.deadline_s - spent_s)
