"""A backend in this process: it records the jobs and paints real images of the asked size, colour from the seed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from app.api.backend import GeneratedImage, HealthReport, ImagesJob, Preview, RequestIdentity, StreamItem
from app.control.counters import CoordinatorCounters
from app.engine.families import FLUX_DEV, Family
from app.errors import ForbiddenError, InvalidRequestError, RequestCancelledError
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.messages.conditioning import TokenCount
from app.messages.loras import LoraListing
from app.messages.results import DenoiseReport, Progress
from app.metrics import CoordinatorMetrics

SCHEDULE = "CCC..C.."


class FakeBackend:
    """Answers at once; ``error`` makes it fail, ``refusal`` already when it is asked, ``hold`` makes it wait until
    cancelled.

    A stream begins after ``start_s``, fails with ``late_error`` after its first progress, and is silent for
    ``silence_s`` before its end.
    """

    def __init__(self) -> None:
        self.jobs: list[ImagesJob] = []
        self.identities: list[RequestIdentity] = []
        self.checked: list[ImagesJob] = []
        self.refusal: Exception | None = None
        self.calibrations: dict[str, CalibrationJob] = {}
        self.error: Exception | None = None
        self.late_error: Exception | None = None
        self.start_s = 0.0
        self.silence_s = 0.0
        self.hold = False
        self.taken = asyncio.Event()
        self.holding = asyncio.Event()
        self.cancelled = 0
        self.ready = True
        self.lowered_by: str | None = None
        self.predicted_error = 0.125
        self.predicted_psnr_db: float | None = 41.26
        self.floor_db: float | None = None
        self.uncached_reason: str | None = None
        self.held: dict[str, asyncio.Event] = {}
        self.kind = FLUX_DEV
        self.listing = LoraListing()
        self.folder = LoraListing()  # what a reload finds
        self.count = TokenCount(32, 32, 20, 20)
        self.registry = CollectorRegistry()
        self.coordinator = CoordinatorMetrics(self.registry, "flux-tiny", "r0", CoordinatorCounters())

    async def reserve(self, job: ImagesJob, identity: RequestIdentity) -> ImagesJob:
        self.identities.append(identity)
        return job

    async def check(self, job: ImagesJob) -> None:
        self.checked.append(job)
        if self.refusal is not None:
            raise self.refusal

    async def generate(self, job: ImagesJob) -> list[GeneratedImage]:
        await self._take(job)
        await self._maybe_hold(job)
        return [self._image(job, job.seed + index) for index in range(job.n)]

    async def stream(self, job: ImagesJob, *, progress: bool) -> AsyncGenerator[StreamItem, None]:
        await self._take(job)
        await asyncio.sleep(self.start_s)
        for index in range(job.n):
            yield self._progress(job, index, 0, "", 2)
        if self.late_error is not None:
            raise self.late_error
        await self._maybe_hold(job)
        for index in range(job.n):
            for step, decision in enumerate(SCHEDULE if progress else "", 1):
                yield self._progress(job, index, step, decision, 0)
            for partial_index in range(job.partial_images):
                yield Preview(index, partial_index, self._file(job, 60 * partial_index))
            await asyncio.sleep(self.silence_s)
            yield self._image(job, job.seed + index)

    def _progress(self, job: ImagesJob, index: int, step: int, decision: str, position: int) -> Progress:
        return Progress(
            index, step, len(SCHEDULE), decision, 1.5 - step / 8, position,
            schedule=SCHEDULE,
            negative_schedule=None if job.negative_prompt is None else SCHEDULE,
            predicted_error=self.predicted_error,
        )  # fmt: skip

    async def cancel(self, request_id: str, key_name: str = "") -> int:
        if any(job.request_id == request_id and job.key_name != key_name for job in self.jobs):
            raise ForbiddenError("the request was made with another API key, which alone can cancel it")
        ended = self.held.pop(request_id, None)
        if ended is None:
            return 0
        ended.set()
        return self.jobs[-1].n

    async def calibrate(self, job: CalibrationJob) -> CalibrationStatus:
        if self.error is not None:
            raise self.error
        self.calibrations[job.id] = job
        return await self.calibration(job.id)

    async def calibration(self, calibration_id: str) -> CalibrationStatus:
        if calibration_id not in self.calibrations:
            raise InvalidRequestError("no such calibration", code="calibration_not_found", status=404)
        return CalibrationStatus(calibration_id, "running", "probe", 20, 300, 12.5)

    async def cancel_calibration(self, calibration_id: str) -> CalibrationStatus:
        return replace(await self.calibration(calibration_id), state="cancelled")

    async def _take(self, job: ImagesJob) -> None:
        self.jobs.append(job)
        self.taken.set()
        if self.error is not None:
            raise self.error

    async def _maybe_hold(self, job: ImagesJob) -> None:
        if not self.hold:
            return
        ended = self.held[job.request_id] = asyncio.Event()
        self.holding.set()
        try:
            await ended.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        raise RequestCancelledError("the request was cancelled")

    def _image(self, job: ImagesJob, seed: int) -> GeneratedImage:
        report = DenoiseReport(
            schedule=SCHEDULE,
            computed=4,
            skipped=4,
            predicted_error=self.predicted_error,
            negative_schedule=None if job.negative_prompt is None else SCHEDULE,
            queue_seconds=0.01,
            denoise_seconds=0.2,
            eta_seconds=1.5,
            queue_position=2,
            lowered_by=self.lowered_by,
            uncached_reason=self.uncached_reason,
            predicted_psnr_db=self.predicted_psnr_db,
            floor_db=self.floor_db,
            profile="flux-tiny@0123456789ab",
        )
        self.coordinator.observe_request(report)
        data = self._file(job, seed)
        prompts = (self.count,) * (1 if job.negative_prompt is None else 2)
        return GeneratedImage(
            data, seed, report, encode_seconds=0.02, decode_seconds=0.03, total_seconds=0.26, prompts=prompts
        )

    def _file(self, job: ImagesJob, colour: int) -> bytes:
        file = io.BytesIO()
        image = Image.new("RGB", (job.width, job.height), (colour % 256, colour // 256 % 256, 128))
        image.save(file, job.output_format.upper(), quality=job.output_compression)
        return file.getvalue()

    async def family(self) -> Family:
        return self.kind

    async def loras(self) -> LoraListing:
        return self.listing

    async def reload_loras(self) -> LoraListing:
        self.listing = self.folder
        return self.listing

    async def health(self) -> HealthReport:
        return HealthReport(self.ready, {"replicas": int(self.ready)})

    async def metric_families(self) -> list[Metric]:
        if self.error is not None:
            raise self.error
        return list(self.registry.collect())

    @contextmanager
    def failing(self, error: Exception) -> Iterator[None]:
        """Within the block every call raises ``error``."""
        self.error = error
        try:
            yield
        finally:
            self.error = None
