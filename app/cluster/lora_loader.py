"""Has the ranks of a group load the adapters of an image before it joins the queue, and free those that make room."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus

import ray
from ray.actor import ActorHandle

from app.cluster.client_errors import unwrap_ray_error
from app.control.lora_table import Content, LoraMoves, LoraTable
from app.errors import DeadlinePassedError, InvalidRequestError
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraUse
from app.metrics import CoordinatorMetrics

logger = logging.getLogger(__name__)

POLL_S = 0.02
"""How often ranks are asked whether they are ready; the steps of other images run in between."""


@dataclass(eq=False)
class _Arrival:
    """An image that waits for its adapters."""

    job: DenoiseJob
    task: asyncio.Task[None]
    error: Exception | None = None


class LoraLoader:
    """The adapters of one group. Images without any never wait for it."""

    def __init__(
        self, ranks: Sequence[ActorHandle], limit_bytes: int, timeout_s: float, metrics: CoordinatorMetrics
    ) -> None:
        """``timeout_s`` is the time that the ranks have to load one."""
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._table = LoraTable(limit_bytes)
        self._loads: dict[Content, asyncio.Future[None]] = {}  # of all that are held
        self._orders: asyncio.Queue[tuple[LoraMoves, list[asyncio.Future[None]]]] = asyncio.Queue()
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._arrivals: dict[str, _Arrival] = {}
        self._failure: Exception | None = None

    @asynccontextmanager
    async def ready(self, job: DenoiseJob) -> AsyncIterator[DenoiseJob]:
        """All ranks hold the adapters of ``job`` within the block; gives it with what is left of its deadline.

        Raises:
            InvalidRequestError: one cannot be loaded (409); the message has the reason.
            DeadlinePassedError: the deadline passed meanwhile.
        """
        if not job.loras:
            yield job
            return
        came = time.monotonic()
        await self._arrive(job)
        try:
            spent_s = time.monotonic() - came
            yield job if job.deadline_s is None else replace(job, deadline_s=job.deadline_s - spent_s)
        finally:
            self._release(job.loras)

    async def _arrive(self, job: DenoiseJob) -> None:
        arrival = _Arrival(job, asyncio.create_task(self._hold(job.loras)))
        self._arrivals[job.row_id] = arrival
        try:
            async with asyncio.timeout(job.deadline_s):
                await arrival.task
        except TimeoutError as error:
            raise DeadlinePassedError("deadline_s passed while the image's adapters were loaded") from error
        except asyncio.CancelledError:
            if arrival.error is not None:
                raise arrival.error from None
            raise
        finally:
            del self._arrivals[job.row_id]

    @property
    def waiting(self) -> list[DenoiseJob]:
        """The jobs that wait for adapters."""
        return [arrival.job for arrival in self._arrivals.values()]

    def end(self, row_id: str, error: Exception | None = None) -> None:
        """End an image that waits for adapters with ``error``, or as cancelled; harmless when it does not wait."""
        arrival = self._arrivals.get(row_id)
        if arrival is not None:
            arrival.error = error
            arrival.task.cancel()

    def fail(self, error: Exception) -> None:
        """The group failed: end all images that wait for adapters, and those to come, with ``error``."""
        self._failure = error
        for row_id in self._arrivals:
            self.end(row_id, error)

    async def run(self) -> None:
        """Have the ranks load and drop adapters, one after another; started once, by the coordinator.

        Not within an image's call: Ray would cancel the loading with the call, and others may wait for it.

        Raises:
            ray.exceptions.RayActorError: a rank died.
        """
        while True:
            moves, loads = await self._orders.get()
            for content in moves.drop:
                await self._drop(content)
            for content, load in zip(moves.load, loads, strict=True):
                await self._load(content, load)
            self._metrics.lora_bytes(self._table.nbytes)

    async def _hold(self, uses: Sequence[LoraUse]) -> None:
        # One after another: an image whose adapters need much room is not overtaken by others for ever.
        async with self._turn:
            while not self._table.has_room(uses):
                self._freed.clear()
                await self._freed.wait()
            if self._failure is not None:
                raise self._failure
            moves = self._table.hold(uses)
            for content in moves.drop:
                del self._loads[content]
            for content in moves.load:
                self._loads[content] = asyncio.get_running_loop().create_future()
            loads = [self._loads[use.content] for use in uses]
            self._orders.put_nowait((moves, [self._loads[content] for content in moves.load]))
        try:
            for load in loads:
                await asyncio.shield(load)
        except BaseException:
            self._release(uses)
            raise

    def _release(self, uses: Sequence[LoraUse]) -> None:
        self._table.release(uses)
        self._freed.set()

    async def _load(self, content: Content, load: asyncio.Future[None]) -> None:
        if self._loads.get(content) is not load:
            return  # its image has left, and others took its room
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._until_loaded(content)
        except ray.exceptions.RayActorError:
            raise
        except Exception as error:  # whatever it is, it ends the images that want this adapter and no others
            cause = unwrap_ray_error(error)
            reason = f"not within {self._timeout_s:g} s" if isinstance(cause, TimeoutError) else str(cause)
            logger.error("adapter %s cannot be loaded: %s", content[0], reason)
            self._metrics.lora_load("failed")
            if self._loads.get(content) is load:
                self._table.forget(content)
                del self._loads[content]
            await self._drop(content)
            load.set_exception(_refusal(content[0], reason))
            load.exception()  # seen, also if no image waits for it any more
        else:
            self._metrics.lora_load("loaded")
            load.set_result(None)

    async def _until_loaded(self, content: Content) -> None:
        while True:
            answers: list[bool] = await asyncio.gather(*(rank.load_lora.remote(*content) for rank in self._ranks))
            if all(answers):
                return
            await asyncio.sleep(POLL_S)

    async def _drop(self, content: Content) -> None:
        await asyncio.gather(*(rank.drop_lora.remote(*content) for rank in self._ranks))


def _refusal(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the adapter {name!r} cannot be loaded: {reason}",
        param="lora",
        code="lora_unusable",
        status=HTTPStatus.CONFLICT,
        headers={"X-Should-Retry": "false"},
    )
