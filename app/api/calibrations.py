"""`/v1/calibrations`: have the service calibrate its own model, and look at how far it is."""

from __future__ import annotations

import uuid
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.responses import Response

from app.api.accept import media_types
from app.api.access import check_operator
from app.api.calibration_status import CalibrationEvent, CalibrationReply, event_of, follow, reply_of
from app.api.events import event_schema
from app.api.guidance import true_cfg
from app.api.replies import AsciiJSONResponse
from app.api.resolve import check_prompt, parse_size
from app.api.routes import Service
from app.api.schemas import ErrorReply, integral
from app.api.streaming import stream_response
from app.api.validation import parse_plain, read_json
from app.engine.families import Family
from app.errors import InvalidRequestError
from app.messages.calibration import CalibrationJob
from app.messages.jobs import steps_of_share
from app.settings import Settings
from magcache_core.calibrate import held_out_by_default, packaged_prompts

router = APIRouter()

FEWEST_STEPS = 6
"""Of fewer steps there is nothing to reuse, and nothing to try."""
RECOMMENDED_SHARE = 10 / 28
"""Share of the steps that a profile recommends to compute where the request names no number."""
_PATH = "/v1/calibrations"
_SCHEMA = "#/components/schemas/CalibrationRequest"
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": text}
    for code, text in {
        400: "A field is wrong; `param` names it.",
        401: "The service wants an API key, and this one is missing or unknown.",
        403: "The service has no API keys, and the request comes from another machine.",
        404: "No such calibration.",
        409: "Another calibration is under way, or the service is not set up for any.",
    }.items()
}


class CalibrationRequest(BaseModel):
    """The body of `POST /v1/calibrations`; every field may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompts: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="One recorded run each, but for the last `judge_runs`; by default a packaged list of 16.",
    )
    size: str | None = Field(default=None, description="`WIDTHxHEIGHT`; the server's default size by default.")
    num_inference_steps: int | None = Field(default=None, ge=FEWEST_STEPS, description="The server's by default.")
    guidance_scale: float | None = Field(default=None, ge=0, le=100, description="The server's by default.")
    negative_prompt: str | None = Field(
        default=None, description="With it true CFG runs, and its branch is measured; an empty one counts."
    )
    true_cfg_scale: float | None = Field(
        default=None, ge=0, le=100, description="Scale of true CFG; as in requests for images by default."
    )
    computed_steps: int | None = Field(
        default=None, ge=2, description="Computed steps that the profile recommends; 10 of 28 in proportion by default."
    )
    trial_runs: int | None = Field(
        default=None, ge=0, le=64, description="Prompts that each schedule is tried on, 4 by default; 0 only predicts."
    )
    judge_runs: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Last prompts that are not recorded and decide between the closest schedules; 4, of fewer than 12 "
        "prompts a third, by default.",
    )
    moves: int | None = Field(
        default=None, ge=0, le=64, description="Schedules to try beside each number of steps' candidates, 6 by default."
    )
    budget_minutes: float | None = Field(
        default=None,
        gt=0,
        le=100_000,
        description="Time of its runs after which it ends with what it has, 30 by default.",
    )

    _integral = field_validator(
        "num_inference_steps", "computed_steps", "trial_runs", "judge_runs", "moves", mode="before"
    )(integral)


@router.post(
    _PATH,
    summary="Calibrate the served model",
    tags=["calibrations"],
    status_code=HTTPStatus.ACCEPTED,
    responses={code: text for code, text in _RESPONSES.items() if code != 404},
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": {"$ref": _SCHEMA}}}}},
)
async def start(request: Request) -> CalibrationReply:
    """Measure the model with the ranks that serve it, while no client's image is there, and plan with the profile."""
    service = _service(request)
    fields = await read_json(request, service.settings.http.max_body_bytes)
    backend = service.get_backend()
    asked = parse_plain(fields, CalibrationRequest)
    return reply_of(await backend.calibrate(resolve_calibration(asked, service.settings, await backend.family())))


@router.get(
    f"{_PATH}/{{calibration_id}}",
    summary="How far is it?",
    tags=["calibrations"],
    response_model=CalibrationReply,
    responses={
        200: {
            "description": "How far it is; with `stream`, or where `Accept` wants events, one event a change until its "
            "end.",
            "content": {"text/event-stream": {"schema": event_schema(CalibrationEvent)}},
        },
        **_RESPONSES,
    },
    openapi_extra={
        "parameters": [
            {
                "name": "stream",
                "in": "query",
                "description": "Answer with server-sent events until it has ended.",
                "schema": {"type": "boolean", "default": False},
            }
        ]
    },
)
async def status(calibration_id: str, request: Request) -> Response:
    """A calibration under way, or one that ended lately."""
    service = _service(request)
    backend = service.get_backend()
    if not _wants_events(request):
        return AsciiJSONResponse(reply_of(await backend.calibration(calibration_id)).model_dump())
    changes = follow(partial(backend.calibration, calibration_id))
    return await stream_response(request, changes, service.settings.http.heartbeat_s, event_of)


@router.delete(f"{_PATH}/{{calibration_id}}", summary="End it", tags=["calibrations"], responses=_RESPONSES)
async def cancel(calibration_id: str, request: Request) -> CalibrationReply:
    """End a calibration; what it found is kept, and the next one for the same goes on there."""
    return reply_of(await _service(request).get_backend().cancel_calibration(calibration_id))


def resolve_calibration(request: CalibrationRequest, settings: Settings, family: Family) -> CalibrationJob:
    """The job that ``request`` asks for, with the server's defaults.

    Raises:
        InvalidRequestError: it is beyond the server's limits or the model's; ``param`` names the field.
    """
    sampling, quality = settings.sampling, settings.quality
    width, height = parse_size(request.size, sampling)
    steps = request.num_inference_steps or sampling.num_inference_steps
    if not FEWEST_STEPS <= steps <= sampling.max_inference_steps:
        raise InvalidRequestError(
            f"num_inference_steps is {steps}; here {FEWEST_STEPS} to {sampling.max_inference_steps} can be calibrated",
            param="num_inference_steps",
        )
    computed = request.computed_steps or steps_of_share(RECOMMENDED_SHARE, steps)
    if computed >= steps:
        raise InvalidRequestError(
            f"computed_steps is {computed}; of {steps} steps at most {steps - 1} leave one to reuse",
            param="computed_steps",
        )
    prompts = tuple(request.prompts) if request.prompts is not None else packaged_prompts()
    for prompt in prompts:
        check_prompt("prompts", prompt, settings)
    judges = held_out_by_default(len(prompts)) if request.judge_runs is None else request.judge_runs
    if judges >= len(prompts):
        raise InvalidRequestError(
            f"judge_runs is {judges}; of {len(prompts)} prompts at most {len(prompts) - 1} leave one to record",
            param="judge_runs",
        )
    if request.negative_prompt is not None:
        check_prompt("negative_prompt", request.negative_prompt, settings, may_be_empty=True)
    ignored: list[str] = []
    negative_prompt, true_cfg_scale = true_cfg(request, family, ignored)
    if ignored:
        raise InvalidRequestError(ignored[0], param="true_cfg_scale")
    presets = (steps_of_share(share, steps) for share in (quality.low, quality.medium, quality.high))
    floors = (quality.low_floor_db, quality.medium_floor_db, quality.high_floor_db)
    chosen = {"trial_runs": request.trial_runs, "moves": request.moves}
    return CalibrationJob(
        id=f"calibration-{uuid.uuid4().hex[:12]}",
        prompts=prompts,
        steps=steps,
        width=width,
        height=height,
        guidance_scale=sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        computed_steps=computed,
        budgets=tuple(dict.fromkeys([computed, *presets])),
        budget_s=60 * (request.budget_minutes or 30.0),
        negative_prompt=negative_prompt,
        true_cfg_scale=true_cfg_scale,
        judge_runs=judges,
        floors_db=tuple(floor for floor in floors if floor is not None),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _wants_events(request: Request) -> bool:
    """Whether the query, or without it the header, asks for server-sent events."""
    asked = request.query_params.get("stream")
    if asked is None:
        accepted = media_types(request.headers.get("accept", ""))
        return next((one for one in accepted if one in ("text/event-stream", "application/json", "*/*")), "") == (
            "text/event-stream"
        )
    if asked not in ("true", "false"):
        raise InvalidRequestError(f"stream is {asked[:32]!r}; it is true or false", param="stream")
    return asked == "true"


def _service(request: Request) -> Service:
    """What the handlers share; only for those who may calibrate."""
    service: Service = request.app.state.service
    check_operator(request, service.settings.http, "calibrates")
    return service
