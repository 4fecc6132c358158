"""The Serve ingress: the HTTP application over handles to the encoder, the replicas and the decoder."""

import asyncio
import time
import uuid
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from app.api.app import create_app
from app.api.backend import HealthReport, ImagesJob, Picture
from app.api.errors import BusyError, InvalidRequestError, UnavailableError
from app.engine.messages import Conditioning, DenoiseJob, DenoiseResult, PromptEmbeddings
from app.metrics import merge_families
from app.serving.group import COORDINATOR_NAME, NAMESPACE
from app.serving.logs import configure_logging
from app.settings import Settings
from magcache_core import ConfigError

ANSWER_SECONDS = 5.0
"""A part that does not answer within this time counts as not ready, and is left out of a scrape."""

_backend: "ServeBackend | None" = None  # one per process; Serve builds the ASGI app after the deployment's constructor


class ServeBackend:
    """Makes pictures with the other deployments."""

    def __init__(
        self, settings: Settings, encoder: DeploymentHandle, replica: DeploymentHandle, decoder: DeploymentHandle
    ):
        self.settings = settings
        self._encoder = encoder
        self._replica = replica
        self._decoder = decoder

    async def generate(self, job: ImagesJob) -> list[Picture]:
        """See `app.api.backend.Backend`."""
        started = time.perf_counter()
        try:
            conditioning = await self._encode(job)
            encode_seconds = time.perf_counter() - started
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._picture(job, index, conditioning, started, encode_seconds))
                    for index in range(job.n)
                ]
        except* BackPressureError:
            raise BusyError(retry_after_s=1.0) from None
        except* ConfigError as errors:
            raise InvalidRequestError(_budget_message(errors.exceptions[0]), param="magcache.computed_steps") from None
        except* UnavailableError as errors:
            raise _cause(errors.exceptions[0]) from None
        except* (ray.exceptions.RayActorError, RayServeException) as errors:
            raise UnavailableError(f"a part of the service is restarting: {errors.exceptions[0]}") from errors
        return [task.result() for task in tasks]

    async def _encode(self, job: ImagesJob) -> Conditioning:
        prompts = [job.prompt] if job.negative_prompt is None else [job.prompt, job.negative_prompt]
        embeddings: list[PromptEmbeddings] = await asyncio.gather(
            *(self._encoder.encode.remote(prompt) for prompt in prompts)
        )
        return Conditioning(*embeddings)

    async def _picture(
        self, job: ImagesJob, index: int, conditioning: Conditioning, started: float, encode_seconds: float
    ) -> Picture:
        denoise = DenoiseJob(
            # A client may send one X-Request-Id twice; rows must stay apart.
            row_id=f"{job.request_id}/{uuid.uuid4().hex[:8]}-{index}",
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            true_cfg_scale=1.0 if job.negative_prompt is None else job.true_cfg_scale,
            seed=job.seed + index,
            magcache=job.magcache,
        )
        result: DenoiseResult = await self._replica.denoise.remote(denoise, conditioning)
        decoding = time.perf_counter()
        data: bytes = await self._decoder.decode.remote(
            result.latents, job.width, job.height, job.output_format, job.output_compression
        )
        finished = time.perf_counter()
        return Picture(
            data=data,
            seed=denoise.seed,
            report=result.report,
            encode_seconds=encode_seconds,
            decode_seconds=finished - decoding,
            total_seconds=finished - started,
        )

    async def health(self) -> HealthReport:
        """Ready when the encoder, the decoder and at least one coordinator, and so a whole group, answer."""
        coordinators, encoder, decoder = await asyncio.gather(
            self._ask_coordinators("ping"), self._is_up(self._encoder), self._is_up(self._decoder)
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

    async def _is_up(self, deployment: DeploymentHandle) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await deployment.ping.remote()
        except (TimeoutError, ray.exceptions.RayError, RayServeException):
            return False
        return True

    async def metric_families(self) -> list[Metric]:
        """All coordinators' families, merged."""
        return merge_families(*await self._ask_coordinators("metric_families"))

    async def _ask_coordinators(self, method: str) -> list[Any]:
        """The answers of those coordinators that do answer; they are found by name, so that none is missed."""
        named = await asyncio.to_thread(ray.util.list_named_actors, True)
        answers = await asyncio.gather(
            *(
                self._ask(actor["name"], method)
                for actor in named
                if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{COORDINATOR_NAME}:")
            ),
            return_exceptions=True,
        )
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask(self, name: str, method: str) -> object:
        actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        return await asyncio.wait_for(getattr(actor, method).remote(), ANSWER_SECONDS)


def _cause(error: BaseException) -> BaseException:
    """What a replica raised, out of the wrapper with its stack that Ray puts around it."""
    return getattr(error, "cause", error)


def _budget_message(error: BaseException) -> str:
    cause = _cause(error)
    assert isinstance(cause, ConfigError)
    return f"magcache.computed_steps={cause.value!r} is not allowed here: it must be {cause.allowed}"


def build_http_app() -> FastAPI:
    """Serve calls this in the ingress replica, after `ImagesApi.__init__`."""
    assert _backend is not None
    return create_app(_backend.settings, lambda: _backend, id_added_in_front=True)


@serve.ingress(build_http_app)
class ImagesApi:
    """Receives HTTP requests."""

    def __init__(
        self, settings: Settings, encoder: DeploymentHandle, replica: DeploymentHandle, decoder: DeploymentHandle
    ) -> None:
        global _backend
        configure_logging(settings.log_level)
        _backend = ServeBackend(settings, encoder, replica, decoder)
