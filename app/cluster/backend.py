"""The API's backend on Ray Serve: prompts to the encoder, images to the replicas, latents to the decoder."""

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray
import torch
from prometheus_client.metrics_core import Metric
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from app.api.backend import GeneratedImage, HealthReport, ImagesJob, RequestIdentity, StreamItem
from app.api.infotext import infotext
from app.cluster.api_processes import ApiProcesses
from app.cluster.calibrator import Calibrator
from app.cluster.calibrator_calls import CalibratorCalls
from app.cluster.client_errors import to_service_error, unwrap_ray_error
from app.cluster.coordinators import Coordinators
from app.cluster.handles import DeploymentProxy, answers_of_all, repeated, result_of
from app.cluster.health import Health
from app.cluster.idle import calibrate_when_idle
from app.cluster.image_call import FileForm, ImageCall, OnEvent
from app.cluster.quality_guard import GuardedImages
from app.cluster.repeats import Repeats
from app.cluster.request_tasks import RequestRegistry, RequestTask
from app.control.demand import CalibrationDemand, Measurable
from app.engine.families import Family
from app.errors import BusyError, ForbiddenError, UnavailableError
from app.lora_folder import common_listing
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraListing
from app.messages.results import DenoiseResult
from app.metrics import merge_families
from app.settings import Settings

if TYPE_CHECKING:
    from app.components.prompt_encoder import PromptEncoder
    from app.components.vae import ImageDecoder

logger = logging.getLogger(__name__)

_LEAST_LEFT_S = 1e-3
_NEWEST_SHARE = 0.2
_NO_PROMPT = PromptEmbeddings(torch.empty(0))


@dataclass(frozen=True)
class RequestContext:
    """A job, when it came, and where its events go; ``emit`` is None when it is not streamed."""

    job: ImagesJob
    started: float
    emit: OnEvent | None
    progress: bool

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.started


class ServeBackend:
    """Makes images with the other deployments; see `app.api.backend.Backend`."""

    def __init__(
        self,
        settings: Settings,
        encoder: "PromptEncoder",
        replica: DeploymentHandle,
        decoder: "ImageDecoder",
        apis: ApiProcesses | None = None,
        coordinators: Coordinators | None = None,
    ) -> None:
        """Create it for one of the API's processes.

        Args:
            apis: this process and the others that serve HTTP beside it; None where there are no others.
            coordinators: of this application; None outside of Serve.
        """
        self.settings = settings
        self._apis = apis or ApiProcesses()
        self._coordinators = coordinators or Coordinators()
        self._encoder = encoder
        self._replica = replica
        self._decoder = decoder
        self._health = Health(settings, encoder, replica, decoder, self._coordinators)
        self._repeats = Repeats(replica, self._apis)
        self._calibrator = Calibrator(settings, encoder, replica, decoder, self._coordinators, self._apis.this)
        self.calibrations = CalibratorCalls(self._calibrator, self._apis)
        self._demand = CalibrationDemand(settings)
        self._idle: asyncio.Task[None] | None = None
        if settings.magcache.calibrate != "off" and settings.magcache.profile_folder is not None:
            self._idle = asyncio.create_task(
                calibrate_when_idle(settings, self._calibrator, self._demand, self.family, lambda: self._apis.is_first)
            )
        target_db = settings.quality_guard.target_psnr_db
        self._guard = (
            None if target_db is None else GuardedImages(settings, target_db, replica, decoder, self._apis.this)
        )
        self._requests = RequestRegistry()
        self._family: Family | None = None
        self._decode_s: dict[int, float] = {}  # running mean by pixels, to be kept free before a deadline

    async def reserve(self, job: ImagesJob, identity: RequestIdentity) -> ImagesJob:
        """Find out whether ``job`` repeats a request."""
        return await self._repeats.reserve(job, identity) if self.settings.idempotency_s else job

    async def check(self, job: ImagesJob) -> None:
        """Have a replica refuse ``job`` if it would refuse its first image now, tokens of references left out."""
        context = RequestContext(job, time.perf_counter(), None, progress=False)
        try:
            asked = self._denoise_job(context, 0, Conditioning(_NO_PROMPT))
            await repeated(lambda: result_of(self._replica.check.remote(asked)))
        except Exception as error:
            raise await self._error_for(error, context) from error

    async def generate(self, job: ImagesJob) -> list[GeneratedImage]:
        """The images of ``job``."""
        return await self._start(job, None, progress=False).result()

    async def stream(self, job: ImagesJob, *, progress: bool) -> AsyncGenerator[StreamItem, None]:
        """What becomes of ``job``, as it happens."""
        items: asyncio.Queue[StreamItem | None] = asyncio.Queue()
        task = self._start(job, items.put_nowait, progress)
        task.task.add_done_callback(lambda _: items.put_nowait(None))
        try:
            while (item := await items.get()) is not None:
                yield item
            await task.result()
        finally:
            await task.cancel_and_wait()

    async def cancel(self, request_id: str, key_name: str = "") -> int:
        """End it at the coordinators, and in the API processes also before and after its time there."""
        at_coordinators = await self._coordinators.call("cancel_request", request_id, key_name)
        at_apis = await self._apis.ask("cancel_here", request_id, key_name)
        here = at_apis or [self.cancel_here(request_id, key_name)]
        ended: int = max(sum(ended for ended, _ in at_coordinators), sum(ended for ended, _ in here))
        if not ended and any(others for _, others in (*at_coordinators, *here)):
            raise ForbiddenError("the request was made with another API key, which alone can cancel it")
        if not ended and not at_apis and not self._apis.is_alone:
            raise UnavailableError("an API process that may have the request does not answer; ask again", 1.0)
        return ended

    def cancel_here(self, request_id: str, key_name: str) -> tuple[int, int]:
        """End what this process works on; see `RequestRegistry.cancel`."""
        return self._requests.cancel(request_id, key_name)

    async def calibrate(self, job: CalibrationJob) -> CalibrationStatus:
        """Begin a calibration."""
        return await self.calibrations.ask("start", job)

    async def stop_background(self) -> None:
        """End what runs in idle time, since the service stops; a calibration's findings are kept."""
        if self._guard is not None:
            self._guard.stop()
        if self._idle is not None:
            self._idle.cancel()
        await self._calibrator.stop()

    async def calibration(self, calibration_id: str) -> CalibrationStatus:
        """How far it is."""
        return await self.calibrations.ask("status", calibration_id)

    async def cancel_calibration(self, calibration_id: str) -> CalibrationStatus:
        """End it."""
        return await self.calibrations.ask("cancel", calibration_id)

    def _start(self, job: ImagesJob, emit: OnEvent | None, progress: bool) -> RequestTask:
        if job.magcache.enabled and not job.sources:
            guidance = job.guidance_scale, 1.0 if job.negative_prompt is None else job.true_cfg_scale
            self._demand.note(Measurable(job.num_inference_steps, job.width, job.height, *guidance), job.n)
        return self._requests.start(
            job.request_id, job.n, self._make(RequestContext(job, time.perf_counter(), emit, progress)), job.key_name
        )

    async def _make(self, context: RequestContext) -> list[GeneratedImage]:
        try:
            conditioning = await self._encode(context.job)
            encode_s = context.elapsed_s
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._image(context, index, conditioning, encode_s))
                    for index in range(context.job.n)
                ]
            return [task.result() for task in tasks]
        except* Exception as errors:
            raise await self._error_for(errors, context) from errors

    async def _error_for(self, error: BaseException, context: RequestContext) -> BaseException:
        """What to raise in the ingress for ``error`` of another part."""
        if isinstance(unwrap_ray_error(error), BackPressureError):
            return BusyError(await self._least_wait_s())
        return to_service_error(error, context.elapsed_s + self._decode_estimate_s(context.job))

    async def _encode(self, job: ImagesJob) -> Conditioning:
        prompts = [job.prompt] if job.negative_prompt is None else [job.prompt, job.negative_prompt]
        embeddings = await asyncio.gather(*(self._encoder.encode(prompt) for prompt in prompts))
        sources = await asyncio.gather(
            *(self._decoder.encode(source.pixels, job.width, job.height, source.mask) for source in job.sources)
        )
        job.sources.clear()  # their pixels are freed; the request goes on for as long as the image takes
        return Conditioning(embeddings[0], None if job.negative_prompt is None else embeddings[1], tuple(sources))

    async def _image(
        self, context: RequestContext, index: int, conditioning: Conditioning, encode_s: float
    ) -> GeneratedImage:
        call = ImageCall(self._replica, self._decoder, _file_form(context.job), context.emit, context.progress)
        try:
            result, data, decode_s, joined = await self._denoise_and_decode(context, index, conditioning, call)
        finally:
            call.stop_previews()
        image = GeneratedImage(
            data, context.job.seed + index, result.report, encode_s, decode_s, context.elapsed_s,
            _source_tokens(conditioning), conditioning.token_counts, joined,
        )  # fmt: skip
        if context.emit is not None:
            context.emit(image)
        return image

    async def _denoise_and_decode(
        self, context: RequestContext, index: int, conditioning: Conditioning, call: ImageCall
    ) -> tuple[DenoiseResult, bytes, float, bool]:
        """One image, and whether it is an earlier request's.

        It is made again (same seed) when its replica dies, or its group with the latents undecoded.
        """
        sharing = context.job.sharing
        for attempt in range(self.settings.rebuild_attempts + 1):
            job = replace(self._denoise_job(context, index, conditioning), sharing=sharing)
            joined = None
            try:
                if sharing is not None and context.job.repeats and not attempt:
                    joined = await call.joined(sharing.image(index))
                result = joined or await call.result(job, conditioning)
                if self._guard is not None:
                    result = replace(result, report=self._guard.measured(job, result.report))
                made = result, *await self._decode(result, context.job, index), joined is not None
                if self._guard is not None and joined is None:
                    self._guard.finished(job, conditioning, result)
                return made
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                if isinstance(error, ray.exceptions.ObjectLostError):
                    sharing = None  # the replica keeps what is lost
                logger.warning("request %s: %s is made again: %s", job.request_id, job.row_id, type(error).__name__)
        raise UnavailableError("the image's replica or group broke again and again before it was decoded; ask again")

    async def _decode(self, result: DenoiseResult, job: ImagesJob, index: int) -> tuple[bytes, float]:
        """The image file, and the seconds that it took."""
        started = time.perf_counter()
        parameters = infotext(job, index, result.report, self.settings.model_name) if job.metadata else None
        data = await self._decoder.decode(result.latents, *_file_form(job), parameters)
        seconds = time.perf_counter() - started
        mean = self._decode_s.get(job.width * job.height, seconds)
        self._decode_s[job.width * job.height] = mean + _NEWEST_SHARE * (seconds - mean)
        return data, seconds

    def _decode_estimate_s(self, job: ImagesJob) -> float:
        return self._decode_s.get(job.width * job.height, 0.0)

    def _denoise_job(self, context: RequestContext, index: int, conditioning: Conditioning) -> DenoiseJob:
        job = context.job
        return DenoiseJob(
            request_id=job.request_id,
            index=index,
            # A client may send one X-Request-Id twice; rows must stay apart.
            row_id=f"{job.request_id}/{uuid.uuid4().hex[:8]}-{index}",
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            true_cfg_scale=1.0 if job.negative_prompt is None else job.true_cfg_scale,
            seed=job.seed + index,
            magcache=job.magcache if self._guard is None else self._guard.options(job.magcache, job.strength),
            priority=job.priority,
            deadline_s=self._left_s(context),
            partial_images=job.partial_images,
            strength=job.strength,
            key_name=job.key_name,
            loras=job.loras,
            retry_key=f"{_digest(job)}/{index}",
            # With strength the one source turns into the image, and no step reads it beside.
            source_tokens=0 if job.strength else _source_tokens(conditioning),
        )

    def _left_s(self, context: RequestContext) -> float | None:
        """What is left of the deadline for denoising."""
        deadline_s = context.job.deadline_s
        if deadline_s is None:
            return None
        # Also when nothing is left: the coordinator knows what would be possible, and says so.
        return max(deadline_s - context.elapsed_s - self._decode_estimate_s(context.job), _LEAST_LEFT_S)

    async def family(self) -> Family:
        """What kind of model is served; asked once of a replica, which has checked the checkpoint."""
        if self._family is None:
            try:
                family: Family = await repeated(lambda: result_of(self._replica.family.remote()))
            except Exception as error:
                raise to_service_error(error, 0.0) from error
            self._family = family
        return self._family

    async def loras(self) -> LoraListing:
        """As the replica that is asked lists them; all read one folder."""
        try:
            listing: LoraListing = await result_of(self._replica.loras.remote())
        except Exception as error:
            raise to_service_error(error, 0.0) from error
        return listing

    async def reload_loras(self) -> LoraListing:
        """Have every replica read it again; what one of them does not find is not there."""
        try:
            listings: list[LoraListing] = await self._replica.broadcast("reload_loras").results_async()
        except Exception as error:
            raise to_service_error(error, 0.0) from error
        if not listings:
            raise UnavailableError
        return common_listing(listings)

    async def health(self) -> HealthReport:
        """See `app.cluster.health.Health.report`."""
        return await self._health.report()

    async def metric_families(self) -> list[Metric]:
        """All families but this API process's own, merged; those that do not answer in time are left out."""
        coordinators, apis, encoder = await asyncio.gather(
            self._coordinators.call("metric_families"), self._apis.ask("metric_families"), self.encoder_families()
        )
        others = (each for name, each in apis if name != self._apis.this)
        return merge_families(*coordinators, *others, encoder, self.background_families())

    def background_families(self) -> list[Metric]:
        """Of what this process runs in idle time: calibrations, and the quality guard where it is on."""
        guard = [] if self._guard is None else self._guard.metric_families()
        return merge_families(self._calibrator.metric_families(), guard)

    async def encoder_families(self) -> list[Metric]:
        """Of the prompt encoder, of all its processes; none when they do not answer in time."""
        if isinstance(self._encoder, DeploymentProxy):
            return merge_families(*await answers_of_all(self._encoder.handle, "metric_families"))
        return await self._encoder.metric_families()

    async def _least_wait_s(self) -> float:
        """When the first of the groups will have room, by their own estimates."""
        return min((load["eta_s"] for load in await self._coordinators.call("load")), default=1.0)


def _digest(job: ImagesJob) -> str:
    """Equal for a request and its repetition, which has another id and, unless the client named it, another seed."""
    content = repr(replace(job, request_id="", seed=0, sources=[], sharing=None, repeats=False))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _source_tokens(conditioning: Conditioning) -> int:
    return sum(len(source.latents) for source in conditioning.sources)


def _file_form(job: ImagesJob) -> FileForm:
    return job.width, job.height, job.output_format, job.output_compression
