"""The coordinator actor: owns the request table and every MagCache decision, and sends all ranks the same plans."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager

import ray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray.actor import ActorHandle

from app.cluster.client_errors import public_reason
from app.cluster.lora_loader import LoraLoader
from app.cluster.rank_watch import RankWatch
from app.control.admission import AdmissionController, SentPlan, default_job
from app.control.counters import CoordinatorCounters
from app.control.progress import ProgressBuffer
from app.control.request import RequestState
from app.control.schedule import SchedulePlanner
from app.errors import (
    DeadlinePassedError,
    GroupFailedError,
    HistoryMismatchError,
    PlanMismatchError,
    RequestCancelledError,
)
from app.logs import configure_logging
from app.messages.conditioning import Conditioning
from app.messages.jobs import COND, UNCOND, DenoiseJob
from app.messages.plans import RowStep, StepPlan
from app.messages.results import DenoiseResult, GroupStart, Latents, Progress, StepResult, StepTime
from app.metrics import CoordinatorMetrics
from app.model_files import model_folder
from app.settings import Settings
from app.telemetry import REQUEST_ID
from magcache_core.run_sums import BranchSums

logger = logging.getLogger(__name__)

QUEUE_PROGRESS_S = 1.0
"""How often the stream of a waiting image gets its place in the queue."""

ByReference = list[Conditioning | ray.ObjectRef[Conditioning]]
"""An image's tensors or a reference to them, in a list so that Ray does not fetch them here: only ranks need them."""


class _Image:
    """An image under way: its table entry, its tensors, its result to come, and the buffer of its stream, if any."""

    def __init__(self, entry: RequestState, tensors: ByReference, progress: ProgressBuffer | None) -> None:
        self.entry = entry
        (self.tensors,) = tensors
        self.progress = progress
        self.taken: RowStep | None = None  # the last step that the ranks have done; the table is a few plans ahead
        self.done: asyncio.Future[DenoiseResult] = asyncio.get_running_loop().create_future()
        if progress is not None:
            close = progress.close
            self.done.add_done_callback(lambda _: close())

    @property
    def steps_done(self) -> int:
        """Steps that the ranks have done."""
        return 0 if self.taken is None else self.taken.step + 1

    def fail(self, error: Exception) -> None:
        """End with ``error``, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class Coordinator:
    """Forms plans tick by tick and keeps ``plans_in_flight`` messages of them ahead of the ranks.

    No plan waits for a result: decisions depend on settings and step indices only, never on the data.
    """

    def __init__(self, settings: Settings) -> None:
        """A process that waits for its ranks, with everything imported: until `lead` it knows of their start alone."""
        from app.engine import sampling  # noqa: F401  # here, so that the replica is up without it

        configure_logging(settings)
        self._settings = settings
        self._starting: GroupStart | None = None

    async def report_start(self, start: GroupStart) -> None:
        """Keep how far the group is, for `starting`."""
        self._starting = start

    async def starting(self) -> GroupStart | None:
        """How far the group's start is; None of one that works, or that is a spare."""
        return self._starting

    async def lead(
        self,
        ranks: Sequence[ActorHandle],
        measured_times: Sequence[Sequence[StepTime]],
        attention: str,
        replica: str,
        rebuilds: int,
        mismatches: int = 0,
    ) -> None:
        """Take ``ranks``, which are loaded; ``measured_times`` is what each of them measured.

        ``attention`` is the backend that they use.
        """
        from app.engine.sampling import FlowMatchSampler

        settings = self._settings
        self._ranks = list(ranks)
        self._watch = RankWatch(self._ranks)
        self._noise = FlowMatchSampler(model_folder(settings))
        self._planner = SchedulePlanner(settings, self._noise)
        slowest = [max(times, key=lambda one: one.seconds) for times in zip(*measured_times, strict=True)]
        self._admission = AdmissionController(settings, self._planner, slowest)
        self._scheduler = self._admission.scheduler
        self._default_job = default_job(settings)
        self._registry = CollectorRegistry()
        self._metrics = CoordinatorMetrics(self._registry, settings.model_name, replica, self.counts)
        self._metrics.attention(attention)
        self._metrics.group_rebuilt(rebuilds)
        self._metrics.digest_mismatch(mismatches)
        self._metrics.waiting_limit(settings.max_waiting_pictures)
        self._loras = LoraLoader(self._ranks, settings.loras_bytes, settings.hang_timeout_s, self._metrics)
        self._images: dict[str, _Image] = {}
        self._failure: GroupFailedError | None = None
        self._work = asyncio.Event()
        self._room = asyncio.Semaphore(settings.plans_in_flight)
        self._sent: asyncio.Queue[tuple[list[SentPlan], list[ray.ObjectRef[list[StepResult]]]]] = asyncio.Queue()
        self._starting = None

    @property
    def counts(self) -> CoordinatorCounters:
        """Totals since the group was built."""
        return self._admission.counts

    # The main path: admit, plan and send, collect, finish.

    async def denoise(self, job: DenoiseJob, tensors: ByReference) -> DenoiseResult:
        """Denoise one image.

        Raises:
            BusyError: the queue is full; it has the time until there is room.
            DeadlineImpossibleError: at once, when no schedule that client and server allow meets the deadline.
            DeadlinePassedError: the deadline passed on the way.
            RequestCancelledError: `cancel_request` ended it.
            InvalidRequestError: one step of it does not fit into a batch, or an adapter cannot be loaded.
            magcache_core.ConfigError: ``computed_steps`` cannot be met with the other settings.
            GroupFailedError: this coordinator or one of its ranks broke; a new group can make the image.
        """
        async with self._with_loras(job) as ready:
            with self._admit(ready, tensors) as image:
                return await image.done

    async def stream(
        self, job: DenoiseJob, tensors: ByReference, progress: bool
    ) -> AsyncGenerator[list[Progress] | DenoiseResult, None]:
        """`denoise` with events on the way: the place in the queue, previews and, with ``progress``, steps."""
        buffer = ProgressBuffer(progress)
        async with self._with_loras(job) as ready:
            with self._admit(ready, tensors, buffer) as image:
                self._emit(image, buffer)
                while events := await self._next_events(image, buffer):
                    yield events
                yield await image.done

    def _with_loras(self, job: DenoiseJob) -> AbstractAsyncContextManager[DenoiseJob]:
        """All ranks hold the adapters of ``job`` within the block; see `LoraLoader.ready`."""
        if job.loras and job.calibration is None:
            self._raise_if_refused(job)  # before anything is loaded for it
        return self._loras.ready(job)

    @contextmanager
    def _admit(self, job: DenoiseJob, tensors: ByReference, progress: ProgressBuffer | None = None) -> Iterator[_Image]:
        REQUEST_ID.set(job.request_id)
        if self._failure is not None:
            raise self._failure
        image = self._images[job.row_id] = _Image(self._admission.submit(job), tensors, progress)
        self._work.set()
        try:
            yield image
        finally:
            # Also when the call is cancelled: no row stays in the table without a call that awaits it.
            del self._images[job.row_id]
            if self._scheduler.cancel(job.row_id) and self._failure is None:
                self.counts.cancelled += 1
                logger.info("request %s: cancelled %s", job.request_id, job.row_id)
                self._work.set()

    async def run(self) -> None:
        """Send plans and collect results until the group fails; started once, when the group is built.

        The plans must not be sent from within `denoise`: Ray cancels a call together with all calls made on its behalf,
        and one client's disconnect would take plans away from the ranks.
        """
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._send_plans())
                loops.create_task(self._collect_results())
                loops.create_task(self._loras.run())
        except* Exception as errors:
            self._fail(errors.exceptions[0])

    async def _send_plans(self) -> None:
        while True:
            await self._work.wait()
            if self._scheduler.in_background:
                # No running ahead: a client's image waits for one step of a calibration at most.
                await self._sent.join()
            await self._room.acquire()
            sent = self._admission.next_message(lambda row_id: self._images[row_id].entry.shape)
            self._end_what_is_too_late()
            if not sent:
                self._work.clear()
                self._room.release()
                continue
            plans = tuple(one.plan for one in sent)
            tensors = [self._images[job.row_id].tensors for plan in plans for job in plan.admit]
            self._sent.put_nowait((sent, [rank.execute.remote(plans, *tensors) for rank in self._ranks]))

    async def _collect_results(self) -> None:
        while True:
            sent, references = await self._sent.get()
            answers: list[list[StepResult]] = await asyncio.gather(*references)
            self._room.release()
            for one, *results in zip(sent, *answers, strict=True):
                _check(one.plan, results)
                self._learn(one, results)
                self._take_steps(one.plan, results[0])
            self._sent.task_done()

    def _take_steps(self, plan: StepPlan, result: StepResult) -> None:
        for row in plan.rows:
            image = self._images.get(row.row_id)
            if image is not None:
                image.taken = row
                preview = result.previews.get(row.row_id)
                if image.progress is not None and (preview is not None or image.progress.is_due(row.last)):
                    self._emit(image, image.progress, preview)
        for row_id, latents in result.latents.items():
            self._finish(row_id, latents, result.sums.get(row_id, {}))

    def _finish(self, row_id: str, latents: Latents, sums: Mapping[str, BranchSums]) -> None:
        image = self._images.get(row_id)
        if image is None or image.done.done():
            return
        report = image.entry.report(time.monotonic())
        if image.entry.job.calibration is not None:
            self.counts.calibration_runs += 1
        else:
            self._metrics.observe_request(report, image.entry.job.request_id)
            self.counts.finished += 1
        image.done.set_result(DenoiseResult(latents, report, sums))

    # What else happens to images and to the group.

    async def cancel(self, row_id: str) -> None:
        """End an image at the next step boundary on every rank; harmless when it is over already."""
        self._loras.end(row_id)
        image = self._images.get(row_id)
        if image is not None:
            image.done.cancel()  # which ends its `denoise`, and with it the row

    async def cancel_request(self, request_id: str, key_name: str = "") -> tuple[int, int]:
        """End all images of a request at the next step boundary on every rank.

        Returns:
            How many images that are, and how many with the same id stay, since another API key asked for them.
        """
        here = [image.entry.job for image in self._images.values() if not image.done.done()]
        under_way = [job for job in (*here, *self._loras.waiting) if job.request_id == request_id]
        ended = [job for job in under_way if job.key_name == key_name]
        for job in ended:
            error = RequestCancelledError(f"request {request_id} was cancelled")
            self._loras.end(job.row_id, error)
            if job.row_id in self._images:
                self._images[job.row_id].fail(error)
        return len(ended), len(under_way) - len(ended)

    async def read_profiles(self) -> None:
        """Read the stored MagCache profiles again, for new images; the log says what that changes by default."""
        before = self._planner.schedules(self._default_job)[COND]
        self._planner = await asyncio.to_thread(SchedulePlanner, self._settings, self._noise)
        self._admission.use(self._planner)
        after = self._planner.schedules(self._default_job)[COND]
        logger.info(
            "MagCache plan of a default image: %s by %s, before %s by %s",
            after.text, after.profile or "no profile", before.text, before.profile or "no profile",
        )  # fmt: skip

    async def load(self) -> dict[str, float]:
        """Images ``waiting`` and ``running``, and ``eta_s``, the estimate that a request of no wishes would get."""
        return self._admission.load(self._default_job)

    async def check(self, job: DenoiseJob) -> None:
        """Raise what `denoise` would raise at once for ``job``, which is not taken."""
        self._raise_if_refused(job)

    def _raise_if_refused(self, job: DenoiseJob) -> None:
        if self._failure is not None:
            raise self._failure
        self._admission.check(job)

    async def ping(self) -> None:
        """Return when all ranks have done what was sent to them before; raises what made the group fail."""
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

    def _learn(self, sent: SentPlan, results: Sequence[StepResult]) -> None:
        self._admission.on_results(sent, results)
        if sent.plan.background:
            return
        self._metrics.observe_step(
            sent.plan,
            [result.seconds for result in results],
            wait_seconds=max(result.idle_seconds for result in results),
            tokens=sum(part.size for part in sent.parts if part.compute),
        )
        self._metrics.residual_bytes(max(result.residual_bytes for result in results))

    def _end_what_is_too_late(self) -> None:
        for entry in self._scheduler.take_too_late():
            self.counts.deadline_passed += 1
            named = {"request_id": entry.job.request_id}  # no request's own task
            logger.info("request %s: deadline passed, %s ended", *named.values(), entry.job.row_id, extra=named)
            image = self._images[entry.job.row_id]
            done = f"{image.steps_done} of {entry.job.steps_to_run} steps"
            image.fail(DeadlinePassedError(f"deadline_s of {entry.job.deadline_s:g} s passed after {done}"))

    def _fail(self, error: Exception) -> None:
        mismatch = isinstance(error, PlanMismatchError)
        self._metrics.digest_mismatch(mismatch)
        logger.error("the group failed: %s", error)
        self._metrics.group_up(False)
        self._failure = (HistoryMismatchError if mismatch else GroupFailedError)(public_reason(error))
        for image in self._images.values():
            image.fail(self._failure)
        self._loras.fail(self._failure)

    async def _next_events(self, image: _Image, buffer: ProgressBuffer) -> list[Progress]:
        while True:
            try:
                async with asyncio.timeout(QUEUE_PROGRESS_S if image.entry.admitted_s is None else None):
                    return await buffer.read()
            except TimeoutError:
                if buffer.is_due():
                    self._emit(image, buffer)

    def _emit(self, image: _Image, buffer: ProgressBuffer, preview: Latents | None = None) -> None:
        """Put where ``image`` stands into its stream."""
        entry, taken = image.entry, image.taken
        decision = "" if taken is None else "C" if taken.branches[0].compute else "."  # the conditional branch's
        cond, uncond = entry.schedules[COND], entry.schedules.get(UNCOND)
        event = Progress(
            index=entry.job.index,
            step=image.steps_done,
            steps=entry.job.steps_to_run,
            decision=decision,
            eta_s=self._admission.eta_s(entry),
            queue_position=self._scheduler.position(entry),
            preview=preview,
            schedule=cond.text,
            negative_schedule=uncond.text if uncond else None,
            predicted_error=cond.predicted_error,
        )
        buffer.push(event)


def _check(plan: StepPlan, results: Sequence[StepResult]) -> None:
    for result in results:
        if (result.sequence, result.digest) != (plan.sequence, plan.digest):
            raise PlanMismatchError(f"rank {result.rank} answered plan {result.sequence}, not {plan.sequence}")
