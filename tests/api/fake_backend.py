"""A backend in this process: it records the jobs and paints real pictures of the asked size, colour from the seed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from app.api.backend import HealthReport, ImagesJob, Picture
from app.engine.messages import DenoiseReport
from app.metrics import CoordinatorMetrics

SCHEDULE = "CCC..C.."


class FakeBackend:
    """Answers at once; ``error`` makes it fail, ``hold`` makes it wait until cancelled."""

    def __init__(self) -> None:
        self.jobs: list[ImagesJob] = []
        self.error: Exception | None = None
        self.hold = False
        self.taken = asyncio.Event()
        self.cancelled = 0
        self.ready = True
        self.registry = CollectorRegistry()
        self.coordinator = CoordinatorMetrics(self.registry, model="flux-tiny", replica="r0")

    async def generate(self, job: ImagesJob) -> list[Picture]:
        self.jobs.append(job)
        self.taken.set()
        if self.error is not None:
            raise self.error
        if self.hold:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return [self._picture(job, job.seed + index) for index in range(job.n)]

    def _picture(self, job: ImagesJob, seed: int) -> Picture:
        report = DenoiseReport(
            schedule=SCHEDULE,
            computed=4,
            skipped=4,
            predicted_error=0.125,
            negative_schedule=None if job.negative_prompt is None else SCHEDULE,
            queue_seconds=0.01,
            denoise_seconds=0.2,
            batch_rows_mean=1.0,
        )
        self.coordinator.observe_request(report)
        file = io.BytesIO()
        picture = Image.new("RGB", (job.width, job.height), (seed % 256, seed // 256 % 256, 128))
        picture.save(file, job.output_format.upper(), quality=job.output_compression)
        return Picture(file.getvalue(), seed, report, encode_seconds=0.02, decode_seconds=0.03, total_seconds=0.26)

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
