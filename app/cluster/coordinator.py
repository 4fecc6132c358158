"""The coordinator actor: owns the request table and every MagCache decision, and tells all ranks the same."""

import asyncio
import logging
import time
from collections.abc import Sequence

import ray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray.actor import ActorHandle

from app.cluster.rank_watch import RankWatch
from app.control.admission import AdmissionController, SentPlan, default_job
from app.control.counters import CoordinatorCounters
from app.control.progress import END, ProgressBatch, ProgressBuffer
from app.control.request import RequestState, RowShape
from app.control.schedule import SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.errors import (
    DeadlinePassedError,
    GroupFailedError,
    HistoryMismatchError,
    PlanMismatchError,
    RequestCancelledError,
)
from app.logs import configure_logging
from app.messages import (
    Conditioning,
    DenoiseJob,
    DenoiseResult,
    Latents,
    Progress,
    RowStep,
    StepPlan,
    StepResult,
    StepTime,
)
from app.metrics import CoordinatorMetrics
from app.model_files import model_folder
from app.settings import Settings
from app.telemetry import REQUEST_ID

logger = logging.getLogger(__name__)

LINGER_S = 5.0
"""How long a watcher may come before its image, and an ended image's last news are kept."""
QUEUE_PROGRESS_S = 1.0
"""How often those who watch a waiting image hear of its place in the queue."""


class _Pending:
    """A submitted image: its table entry, its tensors (by reference unless small) and whoever waits for it."""

    def __init__(self, entry: RequestState, conditioning: "Conditioning | ray.ObjectRef[Conditioning]") -> None:
        self.entry = entry
        self.conditioning = conditioning
        self.done: asyncio.Future[DenoiseResult] = asyncio.get_running_loop().create_future()
        self.taken: RowStep | None = None  # the last step that the ranks have done

    @property
    def steps_done(self) -> int:
        """Steps that the ranks have done; the table is a few plans ahead of them."""
        return 0 if self.taken is None else self.taken.step + 1

    def fail(self, error: Exception) -> None:
        """End the waiting with ``error``, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class Coordinator:
    """Forms plans tick by tick and keeps ``plans_in_flight`` messages of them ahead of the ranks.

    No plan waits for a result: decisions depend on settings and step indices only, never on the data.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Sequence[ActorHandle],
        measured_times: Sequence[Sequence[StepTime]],
        replica: str,
        rebuilds: int,
        mismatches: int = 0,
    ) -> None:
        """``measured_times`` is what each rank measured."""
        configure_logging(settings)
        self._ranks = list(ranks)
        self._watch = RankWatch(self._ranks)
        planner = SchedulePlanner(settings, FlowMatchSampler(model_folder(settings)))
        slowest = [max(times, key=lambda one: one.seconds) for times in zip(*measured_times, strict=True)]
        self._admission = AdmissionController(settings, planner, slowest)
        self._scheduler = self._admission.scheduler
        self._average = default_job(settings)
        self._registry = CollectorRegistry()
        self._metrics = CoordinatorMetrics(self._registry, settings.model_name, replica, self.counts)
        self._metrics.group_rebuilt(rebuilds)
        self._metrics.digest_mismatch(mismatches)
        self._metrics.waiting_limit(settings.max_waiting_pictures)
        self._pending: dict[str, _Pending] = {}
        self._progress: dict[str, ProgressBuffer] = {}
        self._failure: GroupFailedError | None = None
        self._work = asyncio.Event()
        self._room = asyncio.Semaphore(settings.plans_in_flight)
        self._sent: asyncio.Queue[tuple[list[SentPlan], list[ray.ObjectRef[list[StepResult]]]]] = asyncio.Queue()

    @property
    def counts(self) -> CoordinatorCounters:
        """Totals since the group was built."""
        return self._admission.counts

    async def run(self) -> None:
        """Send plans and collect results until the group fails; started once, when the group is built.

        The plans must not be sent from within `denoise`: Ray cancels a call together with all calls made on its behalf,
        and one client's disconnect would take plans away from the ranks.
        """
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._send_plans())
                loops.create_task(self._collect_results())
        except* Exception as errors:
            self._fail(errors.exceptions[0])

    async def denoise(
        self, job: DenoiseJob, conditioning: "list[Conditioning | ray.ObjectRef[Conditioning]]"
    ) -> DenoiseResult:
        """Denoise one image.

        Args:
            conditioning: one, or a reference to it, in a list so that Ray does not fetch it here: only ranks need it.

        Raises:
            BusyError: the queue is full; it says when it is worth asking again.
            DeadlineImpossibleError: at once, when no schedule that client and server allow meets the deadline.
            DeadlinePassedError: the deadline passed on the way.
            RequestCancelledError: `cancel_request` ended it.
            InvalidRequestError: one step of it does not fit into a batch.
            magcache_core.ConfigError: ``computed_steps`` cannot be met with the other settings.
            GroupFailedError: this coordinator or one of its ranks broke; the image is not lost, ask a new group.
        """
        REQUEST_ID.set(job.request_id)
        if self._failure is not None:
            raise self._failure
        (tensors,) = conditioning
        pending = _Pending(self._admission.submit(job), tensors)
        self._pending[job.row_id] = pending
        if job.partial_images:
            self._progress.setdefault(job.row_id, ProgressBuffer())
        if job.row_id in self._progress:
            self._emit(pending)
        self._work.set()
        try:
            return await pending.done
        finally:
            # Also when this call itself is cancelled: a row in the table must have somebody who waits for it.
            del self._pending[job.row_id]
            if self._scheduler.cancel(job.row_id) and self._failure is None:
                self.counts.cancelled += 1
                logger.info("request %s: cancelled %s", job.request_id, job.row_id)
                self._work.set()
            self._close_feed(job.row_id)

    async def cancel(self, row_id: str) -> None:
        """End an image at the next step boundary on every rank; harmless when it is over already."""
        pending = self._pending.get(row_id)
        if pending is not None:
            pending.done.cancel()  # which ends its `denoise`, and with it the row

    async def cancel_request(self, request_id: str) -> int:
        """End all images of a request at the next step boundary on every rank; returns how many."""
        ended = [
            pending
            for pending in self._pending.values()
            if pending.entry.job.request_id == request_id and not pending.done.done()
        ]
        for pending in ended:
            pending.fail(RequestCancelledError(f"request {request_id} was cancelled"))
        return len(ended)

    async def events(self, row_id: str, seen: int) -> ProgressBatch:
        """Wait for news of an image beyond number ``seen`` (0 at first).

        Returns:
            The new events, all previews and the latest progress, and the number to ask with next; ``([], -1)`` when the
            image is over, or is unknown and does not come within `LINGER_S`.
        """
        feed = self._progress.setdefault(row_id, ProgressBuffer())
        while True:
            pending = self._pending.get(row_id)
            if pending is not None and feed.is_empty:
                self._emit(pending)
            waits = pending is not None and pending.entry.admitted_s is None
            patience_s = QUEUE_PROGRESS_S if waits else LINGER_S if pending is None else None
            try:
                async with asyncio.timeout(patience_s):
                    return await feed.read(seen)
            except TimeoutError:
                if pending is not None:
                    self._emit(pending)
                elif row_id not in self._pending:
                    self._progress.pop(row_id, None)
                    return END

    async def load(self) -> dict[str, float]:
        """Images ``waiting`` and ``running``, and ``eta_s``, the estimate that a request of no wishes would get."""
        return self._admission.load(self._average)

    async def ping(self) -> None:
        """Answer when all ranks have done what was sent to them before; raises what made the group fail."""
        if self._failure is None:
            try:
                await self._watch.check()
            except ray.exceptions.RayActorError as error:
                self._fail(error)
        if self._failure is not None:
            raise self._failure

    async def ready(self) -> bool:
        """Whether the group works, as far as the replica's last `ping` knows."""
        return self._failure is None and self._watch.is_fresh

    async def metric_families(self) -> list[Metric]:
        """This coordinator's metrics, for the service's ``/metrics``."""
        self._metrics.running(self._scheduler.running)
        self._metrics.waiting(self._scheduler.waiting)
        return list(self._registry.collect())

    async def _send_plans(self) -> None:
        while True:
            await self._work.wait()
            await self._room.acquire()
            sent = self._admission.next_message(self._shape_of)
            self._end_what_is_too_late()
            if not sent:
                self._work.clear()
                self._room.release()
                continue
            plans = tuple(one.plan for one in sent)
            tensors = [self._pending[job.row_id].conditioning for plan in plans for job in plan.admit]
            self._sent.put_nowait((sent, [rank.execute.remote(plans, *tensors) for rank in self._ranks]))

    async def _collect_results(self) -> None:
        while True:
            sent, references = await self._sent.get()
            answers: list[list[StepResult]] = await asyncio.gather(*references)
            self._room.release()
            for one, *results in zip(sent, *answers, strict=True):
                self._collect(one, results)

    def _collect(self, sent: SentPlan, results: list[StepResult]) -> None:
        self._check(sent.plan, results)
        self._admission.on_results(sent, results)
        self._metrics.observe_step(
            sent.plan,
            [result.seconds for result in results],
            wait_seconds=max(result.idle_seconds for result in results),
            tokens=sum(part.size for part in sent.parts if part.compute),
        )
        self._metrics.residual_bytes(max(result.residual_bytes for result in results))
        for row in sent.plan.rows:
            pending = self._pending.get(row.row_id)
            if pending is not None:
                pending.taken = row
                self._emit_progress(pending, row.last, results[0].previews.get(row.row_id))
        for row_id, latents in results[0].latents.items():
            self._finish(row_id, latents)

    def _shape_of(self, row_id: str) -> RowShape:
        return self._pending[row_id].entry.shape

    def _check(self, plan: StepPlan, results: Sequence[StepResult]) -> None:
        for result in results:
            if (result.sequence, result.digest) != (plan.sequence, plan.digest):
                raise PlanMismatchError(f"rank {result.rank} answered plan {result.sequence}, not {plan.sequence}")

    def _finish(self, row_id: str, latents: Latents) -> None:
        pending = self._pending.get(row_id)
        if pending is None or pending.done.done():
            return
        report = pending.entry.report(time.monotonic())
        self._metrics.observe_request(report, pending.entry.job.request_id)
        self.counts.finished += 1
        pending.done.set_result(DenoiseResult(latents, report))

    def _end_what_is_too_late(self) -> None:
        for entry in self._scheduler.take_too_late():
            self.counts.deadline_passed += 1
            named = {"request_id": entry.job.request_id}  # no request's own task
            logger.info("request %s: deadline passed, %s ended", *named.values(), entry.job.row_id, extra=named)
            pending = self._pending[entry.job.row_id]
            done = f"{pending.steps_done} of {entry.job.steps_to_run} steps"
            pending.fail(DeadlinePassedError(f"deadline_s of {entry.job.deadline_s:g} s passed after {done}"))

    def _fail(self, error: Exception) -> None:
        mismatch = isinstance(error, PlanMismatchError)
        self._metrics.digest_mismatch(mismatch)
        logger.error("the group failed: %s", error)
        self._metrics.group_up(False)
        kind = HistoryMismatchError if mismatch else GroupFailedError
        self._failure = kind(f"{type(error).__name__}: {error}")
        for pending in self._pending.values():
            pending.fail(self._failure)

    def _emit_progress(self, pending: _Pending, last: bool, preview: Latents | None) -> None:
        feed = self._progress.get(pending.entry.job.row_id)
        if feed is not None and (feed.due or last or preview is not None):
            self._emit(pending, preview)

    def _emit(self, pending: _Pending, preview: Latents | None = None) -> None:
        """OnEvent those who watch an image where it stands."""
        entry, taken = pending.entry, pending.taken
        decision = "" if taken is None else "C" if taken.branches[0].compute else "."  # the conditional branch's
        event = Progress(
            index=entry.job.index,
            step=pending.steps_done,
            steps=entry.job.steps_to_run,
            decision=decision,
            eta_s=self._admission.eta_s(entry),
            queue_position=self._scheduler.position(entry),
            preview=preview,
        )
        self._progress[entry.job.row_id].push(event)

    def _close_feed(self, row_id: str) -> None:
        feed = self._progress.get(row_id)
        if feed is not None:
            feed.close()
            asyncio.get_running_loop().call_later(LINGER_S, self._progress.pop, row_id, None)
