"""Compares a sample of finished images with uncached ones while no client's image is there, and holds their quality."""

import asyncio
import logging
import random
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray.serve.handle import DeploymentHandle

from app.cluster.handles import result_of
from app.components.image_file import pixels_of
from app.control.admission import default_job
from app.control.guard import QualityGuard
from app.control.likeness import psnr, ssim
from app.messages.calibration import CalibrationRun
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob, ImageKind, MagCacheOptions
from app.messages.results import DenoiseReport, DenoiseResult, Latents
from app.metrics import GuardMetrics
from app.settings import Settings

if TYPE_CHECKING:
    from app.components.vae import ImageDecoder

logger = logging.getLogger(__name__)

MOST_WAITING = 8
"""Samples that wait for idle time, each with its prompt's embeddings and its latents; the oldest give way."""
_COMPUTE = "C"


@dataclass(frozen=True, eq=False)
class Sample:
    """A finished image to compare, and what it was made of."""

    job: DenoiseJob
    conditioning: Conditioning
    latents: Latents
    kind: ImageKind
    computed: int


class GuardedImages:
    """Samples the images that leave MagCache to the server, and gives the others to come their budgets.

    Its state is in this process: a group that is rebuilt changes nothing, since each job brings its budgets along.
    """

    def __init__(
        self,
        settings: Settings,
        target_db: float,
        replica: DeploymentHandle,
        decoder: "ImageDecoder",
        process: str = "api",
    ) -> None:
        """``process`` is the API process that it is in."""
        self._share = settings.quality_guard.share
        self._replica = replica
        self._decoder = decoder
        self._left_to_server = default_job(settings).magcache
        self._guard = QualityGuard(settings.quality_guard, target_db)
        self._registry = CollectorRegistry()
        self._metrics = GuardMetrics(self._registry, settings.model_name, process, target_db)
        self._draw = random.Random()
        self._waiting: asyncio.Queue[Sample] = asyncio.Queue(MOST_WAITING)
        self._task = asyncio.create_task(self._compare_all())

    def options(self, options: MagCacheOptions, strength: float | None) -> MagCacheOptions:
        """``options`` of a request with the budgets that hold now, unless it has settings of its own.

        Image-to-image is left alone: how near its images are to others is the strength's doing.
        """
        if strength is not None or not options.enabled or options != self._left_to_server:
            return options
        return replace(options, guard_budgets=self._guard.budgets)

    def finished(self, job: DenoiseJob, conditioning: Conditioning, result: DenoiseResult) -> None:
        """Take a finished image, or leave it."""
        kind = self._kind(job, result.report)
        if kind is None or self._draw.random() >= self._share:
            return
        if self._waiting.full():
            self._waiting.get_nowait()
            self._metrics.sampled("dropped")
        self._waiting.put_nowait(Sample(job, conditioning, result.latents, kind, result.report.computed))

    def measured(self, job: DenoiseJob, report: DenoiseReport) -> DenoiseReport:
        """``report`` with the PSNR that such images had here, once enough of them were compared."""
        kind = self._kind(job, report)
        measured_db = None if kind is None else self._guard.mean_db(kind, report.computed)
        return report if measured_db is None else replace(report, predicted_psnr_db=measured_db)

    def metric_families(self) -> list[Metric]:
        """The guard's metrics."""
        return list(self._registry.collect())

    def stop(self) -> None:
        """Compare no more."""
        self._task.cancel()

    def _kind(self, job: DenoiseJob, report: DenoiseReport) -> ImageKind | None:
        """The kind of image that it is; None for one whose computed steps the guard does not decide."""
        own = replace(job.magcache, guard_budgets=()) != self._left_to_server
        if own or job.strength is not None or report.profile is None or report.lowered_by or not report.skipped:
            return None
        return ImageKind(report.profile, job.num_inference_steps, len(job.branches) > 1)

    async def _compare_all(self) -> None:
        while True:
            sample = await self._waiting.get()
            try:
                await self._compare(sample)
            except Exception as error:  # one that cannot be run again says nothing about the others
                self._metrics.sampled("failed")
                logger.warning("quality guard: a sample is left out: %s: %s", type(error).__name__, error)

    async def _compare(self, sample: Sample) -> None:
        job = sample.job
        result: DenoiseResult = await result_of(self._replica.denoise.remote(uncached(job), sample.conditioning))
        # Finished images of clients are decoded before previews, and so before these.
        cached, reference = [
            pixels_of(await self._decoder.preview(latents, job.width, job.height, "png", 100))[None]
            for latents in (sample.latents, result.latents)
        ]
        psnr_db = float(await asyncio.to_thread(psnr, cached, reference))
        similarity = float(await asyncio.to_thread(ssim, cached, reference))
        kind = sample.kind
        change = self._guard.observe(kind, sample.computed, psnr_db)
        self._metrics.compared(kind, sample.computed, psnr_db, similarity)
        self._metrics.holds(kind, self._guard.budget(kind), self._guard.worst_tenth_db(kind))
        if change is not None:
            self._metrics.changed("up" if change.after > change.before else "down")
            estimate = "too few to say" if change.worst_tenth_db is None else f"{change.worst_tenth_db:.1f} dB"
            logger.info(
                "quality guard: %d instead of %d of %d steps compute by %s; 10th percentile of %d images' PSNR: %s",
                change.after, change.before, kind.steps, kind.profile, change.images, estimate,
            )  # fmt: skip


def uncached(job: DenoiseJob) -> DenoiseJob:
    """``job`` with every step computed, as a row in the background: it steps only while no client's image is there."""
    request_id = f"guard-{uuid.uuid4().hex[:12]}"
    return replace(
        job,
        request_id=request_id,
        row_id=f"{request_id}/0",
        index=0,
        sharing=None,
        magcache=MagCacheOptions(enabled=False),
        calibration=CalibrationRun(_COMPUTE * job.num_inference_steps),
        priority=0,
        deadline_s=None,
        partial_images=0,
        key_name="",
        retry_key="",
    )
