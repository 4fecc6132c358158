"""The API's backend on Ray Serve: prompts to the encoder, pictures to the replicas, latents to the decoder."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import ray
from prometheus_client.metrics_core import Metric
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from app.api.backend import HealthReport, ImagesJob, Picture, StreamItem
from app.api.errors import BusyError
from app.engine.families import Family
from app.engine.messages import Conditioning, DenoiseJob, DenoiseResult
from app.metrics import merge_families
from app.serving.calls import result_of
from app.serving.client_errors import client_error, innermost
from app.serving.coordinators import ANSWER_SECONDS, ask_coordinators
from app.serving.decoder import ImageDecoder
from app.serving.encoder import PromptEncoder
from app.serving.flights import Flight, Flights
from app.serving.following import FileForm, Follower
from app.settings import Settings

_LEAST_LEFT_S = 1e-3
_NEWEST_SHARE = 0.2

Tell = Callable[[StreamItem], None]


@dataclass(frozen=True)
class _Order:
    """A job on its way: since when, and whom to tell of it (nobody when it is not streamed)."""

    job: ImagesJob
    started: float
    tell: Tell | None
    progress: bool

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.started


class ServeBackend:
    """Makes pictures with the other deployments; see `app.api.backend.Backend`."""

    def __init__(
        self, settings: Settings, encoder: PromptEncoder, replica: DeploymentHandle, decoder: ImageDecoder
    ) -> None:
        self.settings = settings
        self._encoder = encoder
        self._replica = replica
        self._decoder = decoder
        self._flights = Flights()
        self._family: Family | None = None
        self._decode_s: dict[int, float] = {}  # running mean by pixels, to be kept free before a deadline

    async def generate(self, job: ImagesJob) -> list[Picture]:
        """The pictures of ``job``."""
        return await self._start(job, None, progress=False).land()

    async def stream(self, job: ImagesJob, *, progress: bool) -> AsyncGenerator[StreamItem, None]:
        """What becomes of ``job``, as it happens."""
        items: asyncio.Queue[StreamItem | None] = asyncio.Queue()
        flight = self._start(job, items.put_nowait, progress)
        flight.task.add_done_callback(lambda _: items.put_nowait(None))
        try:
            while (item := await items.get()) is not None:
                yield item
            await flight.land()
        finally:
            await flight.abandon()

    async def cancel(self, request_id: str) -> int:
        """End it at the coordinators, and in this process also before and after its time there."""
        at_coordinators: int = sum(await ask_coordinators("cancel_request", request_id))
        return max(at_coordinators, self._flights.end(request_id))

    def _start(self, job: ImagesJob, tell: Tell | None, progress: bool) -> Flight:
        return self._flights.start(job.request_id, job.n, self._make(_Order(job, time.perf_counter(), tell, progress)))

    async def _make(self, order: _Order) -> list[Picture]:
        try:
            conditioning = await self._encode(order.job)
            encode_s = order.elapsed_s
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._picture(order, index, conditioning, encode_s))
                    for index in range(order.job.n)
                ]
            return [task.result() for task in tasks]
        except* Exception as errors:
            if isinstance(innermost(errors), BackPressureError):
                raise BusyError(await _least_wait_s()) from errors
            raise client_error(errors, order.elapsed_s + self._decode_estimate_s(order.job)) from errors

    async def _encode(self, job: ImagesJob) -> Conditioning:
        prompts = [job.prompt] if job.negative_prompt is None else [job.prompt, job.negative_prompt]
        embeddings = await asyncio.gather(*(self._encoder.encode(prompt) for prompt in prompts))
        sources = await asyncio.gather(
            *(self._decoder.encode(source.pixels, job.width, job.height) for source in job.sources)
        )
        return Conditioning(embeddings[0], None if job.negative_prompt is None else embeddings[1], tuple(sources))

    async def _picture(self, order: _Order, index: int, conditioning: Conditioning, encode_s: float) -> Picture:
        denoise, form = self._denoise_job(order, index, conditioning), _file_form(order.job)
        if order.tell is None:
            result: DenoiseResult = await result_of(self._replica.denoise.remote(denoise, conditioning))
            data, decode_s = await self._decode(result, order.job)
        else:
            follower = Follower(self._replica, self._decoder, form, index, order.tell)
            try:
                result = await follower.result(denoise, conditioning, order.progress)
                data, decode_s = await self._decode(result, order.job)
            finally:
                follower.stop_previews()
        picture = Picture(
            data, denoise.seed, result.report, encode_s, decode_s, order.elapsed_s, _source_tokens(conditioning)
        )
        if order.tell is not None:
            order.tell(picture)
        return picture

    async def _decode(self, result: DenoiseResult, job: ImagesJob) -> tuple[bytes, float]:
        """The picture file, and the seconds that it took."""
        started = time.perf_counter()
        data = await self._decoder.decode(result.latents, *_file_form(job))
        seconds = time.perf_counter() - started
        mean = self._decode_s.get(job.width * job.height, seconds)
        self._decode_s[job.width * job.height] = mean + _NEWEST_SHARE * (seconds - mean)
        return data, seconds

    def _decode_estimate_s(self, job: ImagesJob) -> float:
        return self._decode_s.get(job.width * job.height, 0.0)

    def _denoise_job(self, order: _Order, index: int, conditioning: Conditioning) -> DenoiseJob:
        job = order.job
        return DenoiseJob(
            # A client may send one X-Request-Id twice; rows must stay apart.
            row_id=f"{job.request_id}/{uuid.uuid4().hex[:8]}-{index}",
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            true_cfg_scale=1.0 if job.negative_prompt is None else job.true_cfg_scale,
            seed=job.seed + index,
            magcache=job.magcache,
            priority=job.priority,
            deadline_s=self._left_s(order),
            partial_images=job.partial_images,
            strength=job.strength,
            # With strength the one source turns into the picture, and no step reads it beside.
            source_tokens=0 if job.strength else _source_tokens(conditioning),
        )

    def _left_s(self, order: _Order) -> float | None:
        """What is left of the deadline for denoising."""
        deadline_s = order.job.deadline_s
        if deadline_s is None:
            return None
        # Also when nothing is left: the coordinator knows what would be possible, and says so.
        return max(deadline_s - order.elapsed_s - self._decode_estimate_s(order.job), _LEAST_LEFT_S)

    async def family(self) -> Family:
        """What kind of model is served; asked once of the decoder, which has its files."""
        if self._family is None:
            try:
                self._family = await self._decoder.family()
            except Exception as error:
                raise client_error(error, 0.0) from error
        return self._family

    async def health(self) -> HealthReport:
        """Ready when the encoder, the decoder and at least one coordinator, and so a whole group, answer."""
        coordinators, encoder, decoder = await asyncio.gather(
            ask_coordinators("ping"), _is_up(self._encoder), _is_up(self._decoder)
        )
        return HealthReport(
            ready=bool(coordinators) and encoder and decoder,
            details={
                "model": self.settings.model_name,
                "groups_ready": len(coordinators),
                "encoder_ready": encoder,
                "decoder_ready": decoder,
            },
        )

    async def metric_families(self) -> list[Metric]:
        """The encoder's and all coordinators' families, merged; who does not answer is left out."""
        coordinators, encoder = await asyncio.gather(ask_coordinators("metric_families"), _families_of(self._encoder))
        return merge_families(*coordinators, encoder)


def _source_tokens(conditioning: Conditioning) -> int:
    return sum(len(source.latents) for source in conditioning.sources)


def _file_form(job: ImagesJob) -> FileForm:
    return job.width, job.height, job.output_format, job.output_compression


async def _least_wait_s() -> float:
    """When the first of the groups will have room, by their own estimates."""
    return min((load["eta_s"] for load in await ask_coordinators("load")), default=1.0)


async def _families_of(encoder: PromptEncoder) -> list[Metric]:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            families = await encoder.metric_families()
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        return []
    return families


async def _is_up(part: PromptEncoder | ImageDecoder) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await part.ping()
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        return False
    return True
