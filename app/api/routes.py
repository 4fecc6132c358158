"""The routes. Each handler is short: read, validate, ask the backend, answer."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from app.api.accept import prefers_html
from app.api.backend import Backend, GeneratedImage, StreamItem
from app.api.drain import Drain
from app.api.events import STREAM_EVENTS, Kind, event_of, event_schema, stream_headers
from app.api.idempotency import body_digest, identity_of
from app.api.image_memory import ImageMemory
from app.api.loras import may_name_loras
from app.api.middleware import EDITS_PATH, IMAGES_PATH
from app.api.page import page_response
from app.api.replies import AsciiJSONResponse, images_response
from app.api.resolve import ResolvedRequest, resolve_request
from app.api.schemas import (
    CancelReply,
    Capabilities,
    ErrorReply,
    HealthReply,
    ImagesReply,
    ImagesRequest,
    ModelCard,
    ModelList,
)
from app.api.streaming import stream_response
from app.api.validation import parse, read_json
from app.engine.families import Edits
from app.errors import ModelNotFoundError, RequestNotFoundError, ServiceError
from app.messages.loras import LoraListing
from app.metrics import ApiMetrics, Families, merge_families
from app.settings import Settings
from app.telemetry import Attributes, Tracing

logger = logging.getLogger(__name__)
router = APIRouter()

FAMILY_S = 1.0
"""How long a list of models waits for a replica that can say what the model does."""


@dataclass(frozen=True)
class Service:
    """What the handlers share; the application keeps it as ``app.state.service``."""

    settings: Settings
    get_backend: Callable[[], Backend]
    drain: Drain
    image_memory: ImageMemory
    registry: CollectorRegistry
    metrics: ApiMetrics
    tracing: Tracing
    started: int

    def observe(self, image: GeneratedImage, request_id: str) -> None:
        """Count and trace one finished image."""
        phases, report = image.phases, image.report
        if image.joined:
            self.metrics.joined()
        self.metrics.observe_phases(**phases, request_id=request_id)
        attributes: Attributes = {
            "flux.request_id": request_id,
            "flux.seed": image.seed if image.seed < 2**63 else str(image.seed),  # spans have no larger integers
            "flux.schedule": report.schedule,
        }
        self.tracing.image(**phases, attributes=attributes)

    async def loras(self, fields: Mapping[str, Any]) -> LoraListing:
        """The adapters that there are, as far as the request with ``fields`` may name one."""
        return await self.get_backend().loras() if may_name_loras(fields, self.settings) else LoraListing()

    async def cards(self) -> list[ModelCard]:
        """The served model, as OpenAI's clients list it, under each of its names."""
        capabilities = await self._capabilities()
        return [
            ModelCard(id=name, created=self.started, owned_by="flux-magcache-serve", capabilities=capabilities)
            for name in self.settings.model_names
        ]

    async def _capabilities(self) -> Capabilities | None:
        try:
            async with asyncio.timeout(FAMILY_S):
                family = await self.get_backend().family()
        except (TimeoutError, ServiceError):
            return None
        return Capabilities(
            images=family.max_sources,
            strength=family.edits is Edits.STRENGTH,
            mask=family.inpaints,
            negative_prompt=family.true_cfg,
        )


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def key_name_of(request: Request) -> str:
    """The name of the request's API key; empty where the service has none."""
    name: str = getattr(request.state, "key_name", "")
    return name


def model_in_path(request: Request) -> dict[str, str]:
    """The field `model` of a request whose path names it, as Azure's does; it counts for more than the body's."""
    model = request.state.deployment
    return {} if model is None else {"model": model}


def _errors(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    return {code.lstrip("s"): {"model": ErrorReply, "description": text} for code, text in descriptions.items()}


_NO_KEY = "The service wants an API key, and this one is missing or unknown."
IMAGES_RESPONSES: Mapping[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesReply,
        "description": "The images; with `response_format: file` or an image type in `Accept` the bare file; with "
        "`stream` server-sent events.",
        "content": {
            f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in ("png", "jpeg", "webp")
        }
        | {"text/event-stream": {"schema": event_schema(*STREAM_EVENTS)}},
    },
    **_errors(
        s400="A field is wrong; `param` names it.",
        s401=_NO_KEY,
        s404="No such model, or no such adapter.",
        s406="`Accept` asks for an image type that does not exist here.",
        s409="The request was cancelled, or its adapter cannot be loaded.",
        s413="The body is too large.",
        s415="The body is not JSON.",
        s422="`deadline_s` cannot be met; `X-Soonest-Seconds` says what can. Or the `Idempotency-Key` came with "
        "another body.",
        s429="The queue is full; `Retry-After` says when to ask again.",
        s500="The images could not be made.",
        s503="Not ready; `Retry-After` says when to ask again.",
        s504="`deadline_s` passed.",
    ),
}


@router.post(
    IMAGES_PATH,
    summary="Make images",
    tags=["images"],
    responses=dict(IMAGES_RESPONSES),
    # The body is read by hand, for the size limit and for errors that name the field; the schema is declared here.
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ImagesRequest"}}},
        }
    },
)
async def generate(request: Request) -> Response:
    """OpenAI's image generation, with FLUX's and MagCache's own settings beside OpenAI's."""
    resolved, body = await _resolved(request)
    return await answer(request, resolved, body)


async def _resolved(request: Request) -> tuple[ResolvedRequest, str]:
    """The request and the digest of its body, which is not kept: fields without effect may hold megabytes."""
    service = _service(request)
    with service.image_memory.claim() as arriving:
        fields = await read_json(request, service.settings.http.max_body_bytes, arriving.grow)
        resolve = partial(
            resolve_request,
            settings=service.settings,
            family=await service.get_backend().family(),
            request_id=request.state.request_id,
            key_name=key_name_of(request),
            loras=await service.loras(fields),
        )
        body = parse(fields | model_in_path(request), ImagesRequest, resolve)
        resolved = resolve(body, accept=request.headers.get("accept", ""))
        return resolved, body_digest(fields | model_in_path(request))


async def answer(request: Request, resolved: ResolvedRequest, body: str, kind: Kind = "image_generation") -> Response:
    """Have the images made and reply in the form that was asked for; ``body`` is the digest of the request's."""
    service = _service(request)
    identity = identity_of(request, body, key_name_of(request))
    job = await service.get_backend().reserve(resolved.job, identity)
    resolved = replace(resolved, job=job)
    request.state.loras = [use.name for use in job.loras]
    logger.info(
        "request %s: %d image(s) of %dx%d, %d steps, seed %d, true CFG %s, MagCache %s%s%s%s",
        job.request_id, job.n, job.width, job.height, job.num_inference_steps, job.seed,
        "off" if job.negative_prompt is None else job.true_cfg_scale, "on" if job.magcache.enabled else "off",
        "".join(f", adapter {use.name!r} x {use.scale:g}" for use in job.loras),
        ", streamed" if resolved.stream else "", ", repeated" if job.repeats else "",
    )  # fmt: skip
    backend = service.get_backend()
    observe = partial(service.observe, request_id=job.request_id)
    if resolved.stream:

        def event(item: StreamItem) -> bytes | None:
            if isinstance(item, GeneratedImage):
                observe(item)
            return event_of(resolved, item, kind)

        items = backend.stream(job, progress=resolved.progress)
        headers_of = partial(stream_headers, resolved)
        return await stream_response(request, items, service.settings.http.heartbeat_s, event, headers_of)
    images = await backend.generate(job)
    for image in images:
        observe(image)
    return images_response(resolved, images)


@router.delete(
    "/v1/requests/{request_id}",
    summary="Cancel a request",
    tags=["images"],
    responses=_errors(
        s401=_NO_KEY,
        s403="Another API key made the request.",
        s404="No such request is under way.",
        s503="It is not known whether it is; `Retry-After` says when to ask again.",
    ),
)
async def cancel(request_id: str, request: Request) -> CancelReply:
    """End every request whose `X-Request-Id` is this; a client that waits for one gets 409."""
    images = await _service(request).get_backend().cancel(request_id, key_name_of(request))
    if images == 0:
        raise RequestNotFoundError(f"no request {request_id[:128]!r} is under way; it may be over already")
    logger.info("request %s: %d image(s) cancelled by %s", request_id[:128], images, request.state.request_id)
    return CancelReply(id=request_id, pictures=images)


@router.get(
    "/health",
    summary="Is it ready?",
    tags=["service"],
    response_model=HealthReply,
    responses={503: {"model": HealthReply, "description": "Images cannot be made right now."}},
)
async def health(request: Request) -> Response:
    """200 when images can be made right now, else 503; details for the operator either way."""
    service = _service(request)
    report = await service.get_backend().health()
    ready = report.ready and not service.drain.begun
    reply = HealthReply(
        status="ok" if ready else "unavailable",
        model=service.settings.model_name,
        details=report.details | ({"stopping": True} if service.drain.begun else {}),
    )
    status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
    return AsciiJSONResponse(reply.model_dump(mode="json"), status_code=status)


@router.get("/v1/models", summary="List the served models", tags=["models"], responses=_errors(s401=_NO_KEY))
async def list_models(request: Request) -> ModelList:
    """One model is served, under its name and its aliases."""
    return ModelList(data=await _service(request).cards())


@router.get(
    "/v1/models/{model_id:path}",
    summary="One served model",
    tags=["models"],
    responses=_errors(s401=_NO_KEY, s404="No such model."),
)
async def get_model(model_id: str, request: Request) -> ModelCard:
    """The model named ``model_id``."""
    cards = await _service(request).cards()
    for card in cards:
        if card.id == model_id:
            return card
    raise ModelNotFoundError(f"model {model_id[:80]!r} is not served here; there is {cards[0].id!r}", param="model")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    tags=["service"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """The API processes' and the coordinators' metrics in Prometheus' text format, or in OpenMetrics if asked for."""
    service = _service(request)
    try:
        families = await service.get_backend().metric_families()
    except ServiceError as error:
        # While a group is down its numbers are missing, and those that show it must not be.
        logger.warning("request %s: no coordinator metrics: %s", request.state.request_id, error.message)
        families = []
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    body = encode(Families(merge_families(service.registry.collect(), families)))
    return Response(body, headers={"Content-Type": content_type})


@router.get(
    "/",
    summary="What is here",
    tags=["service"],
    response_model=dict[str, Any],
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def index(request: Request) -> Response:
    """The endpoints of this service; for a browser (`Accept: text/html`) a page to try them on."""
    if prefers_html(request.headers.get("accept", "")):
        return page_response(request)
    content = {
        "service": "flux-magcache-serve",
        "model": _service(request).settings.model_name,
        "endpoints": {
            f"POST {IMAGES_PATH}": "make images (OpenAI's dialect)",
            f"POST {EDITS_PATH}": "edit images (OpenAI's dialect)",
            "DELETE /v1/requests/{id}": "cancel a request by its X-Request-Id",
            "POST /v1/calibrations": "calibrate the served model in its idle time",
            "GET /v1/models": "the served model",
            "GET /v1/loras": "the adapters that requests may name",
            "GET /health": "200 when images can be made, else 503",
            "GET /metrics": "Prometheus metrics",
            "GET /docs": "every field, to read and to try",
        },
    }
    return AsciiJSONResponse(content, headers={"Vary": "Accept"})


def new_service(settings: Settings, get_backend: Callable[[], Backend], process: str) -> Service:
    """The shared state of one application, with a metric registry of its own."""
    registry = CollectorRegistry()
    metrics, drain = ApiMetrics(registry, settings.model_name, process), Drain(settings.drain_seconds)
    memory = ImageMemory(settings.http.max_decoded_bytes)
    return Service(settings, get_backend, drain, memory, registry, metrics, Tracing(settings), int(time.time()))
