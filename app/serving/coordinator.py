"""The coordinator actor: owns the request table and every MagCache decision, and tells all ranks the same."""

import asyncio
import logging
import time
from collections.abc import Sequence

import ray
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray.actor import ActorHandle

from app.engine.engine import PlanMismatchError
from app.engine.messages import Conditioning, DenoiseJob, DenoiseResult, StepPlan, StepResult
from app.engine.sampling import FlowMatchSampler
from app.metrics import CoordinatorMetrics
from app.serving.errors import GroupFailedError
from app.serving.logs import configure_logging
from app.serving.model_files import local_model
from app.serving.scheduler import Entry, StepScheduler
from app.serving.trajectory import TrajectoryPlanner
from app.settings import Settings

logger = logging.getLogger(__name__)


class _Pending:
    """A submitted picture: its table entry, its tensors (by reference only) and whoever waits for it."""

    def __init__(self, entry: Entry, conditioning: "ray.ObjectRef[Conditioning]") -> None:
        self.entry = entry
        self.conditioning = conditioning
        self.done: asyncio.Future[DenoiseResult] = asyncio.get_running_loop().create_future()


class Coordinator:
    """Forms a plan per tick and keeps ``plans_in_flight`` of them ahead of the ranks.

    No plan waits for a result: decisions depend on settings and step indices only, never on the data.
    """

    def __init__(self, settings: Settings, ranks: Sequence[ActorHandle], replica: str, rebuilds: int) -> None:
        configure_logging(settings.log_level)
        self._ranks = list(ranks)
        self._planner = TrajectoryPlanner(settings, FlowMatchSampler(local_model(settings.model, settings.revision)))
        self._scheduler = StepScheduler(settings.max_batch_rows)
        self._registry = CollectorRegistry()
        self._metrics = CoordinatorMetrics(self._registry, settings.model_name, replica)
        self._metrics.group_rebuilt(rebuilds)
        self._pending: dict[str, _Pending] = {}
        self._failure: GroupFailedError | None = None
        self._work = asyncio.Event()
        self._room = asyncio.Semaphore(settings.plans_in_flight)
        self._sent: asyncio.Queue[tuple[StepPlan, list[ray.ObjectRef[StepResult]]]] = asyncio.Queue()

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

    async def denoise(self, job: DenoiseJob, conditioning: "list[ray.ObjectRef[Conditioning]]") -> DenoiseResult:
        """Denoise one picture.

        Args:
            conditioning: one reference, in a list so that Ray does not fetch it here: only ranks need the tensors.

        Raises:
            GroupFailedError: this coordinator or one of its ranks broke; the picture is not lost, ask a new group.
        """
        if self._failure is not None:
            raise self._failure
        (reference,) = conditioning
        trajectories = self._planner.trajectories(job)
        pending = _Pending(self._scheduler.submit(job, trajectories), reference)
        self._pending[job.row_id] = pending
        self._work.set()
        try:
            return await pending.done
        finally:
            # Also when this call itself is cancelled: a row in the table must have somebody who waits for it.
            del self._pending[job.row_id]
            if self._scheduler.cancel(job.row_id):
                logger.info("request %s: cancelled %s", job.request_id, job.row_id)
                self._work.set()

    async def cancel(self, row_id: str) -> None:
        """End a picture at the next step boundary on every rank; harmless when it is over already."""
        pending = self._pending.get(row_id)
        if pending is not None:
            pending.done.cancel()  # which ends its `denoise`, and with it the row

    async def ping(self) -> None:
        """Answer when alive; raises what made this coordinator fail."""
        if self._failure is not None:
            raise self._failure

    async def metric_families(self) -> list[Metric]:
        """This coordinator's metrics, for the service's ``/metrics``."""
        self._observe_table()
        return list(self._registry.collect())

    async def _send_plans(self) -> None:
        while True:
            await self._work.wait()
            await self._room.acquire()
            plan = self._scheduler.next_plan()
            if plan is None:
                self._work.clear()
                self._room.release()
                continue
            tensors = [self._pending[job.row_id].conditioning for job in plan.admit]
            self._sent.put_nowait((plan, [rank.execute.remote(plan, *tensors) for rank in self._ranks]))

    async def _collect_results(self) -> None:
        while True:
            plan, references = await self._sent.get()
            results: list[StepResult] = await asyncio.gather(*references)
            self._room.release()
            self._check(plan, results)
            self._metrics.observe_step(plan, max(result.seconds for result in results))
            self._metrics.residual_bytes(max(result.residual_bytes for result in results))
            for row_id, latents in results[0].latents.items():
                self._finish(row_id, latents)

    def _check(self, plan: StepPlan, results: Sequence[StepResult]) -> None:
        for result in results:
            if (result.sequence, result.digest) != (plan.sequence, plan.digest):
                raise PlanMismatchError(f"rank {result.rank} answered plan {result.sequence}, not {plan.sequence}")

    def _finish(self, row_id: str, latents: torch.Tensor) -> None:
        pending = self._pending.get(row_id)
        if pending is None or pending.done.done():
            return
        report = pending.entry.report(time.monotonic())
        self._metrics.observe_request(report)
        pending.done.set_result(DenoiseResult(latents, report))

    def _fail(self, error: Exception) -> None:
        if isinstance(error, PlanMismatchError):
            self._metrics.digest_mismatch()
        logger.error("the group failed: %s", error)
        self._failure = GroupFailedError(f"{type(error).__name__}: {error}")
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(self._failure)

    def _observe_table(self) -> None:
        self._metrics.running(self._scheduler.running)
        self._metrics.waiting(self._scheduler.waiting)
