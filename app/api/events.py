"""The events of a stream, as OpenAI's image streaming has them, and this service's own beside them."""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from app.api.backend import OutputFormat, Preview, StreamItem
from app.api.replies import all_warnings, ascii_json, finite, image_reply, usage
from app.api.resolve import ResolvedRequest
from app.api.schemas import ErrorBody, ImageReply, Quality, Usage
from app.errors import ServiceError
from app.messages.results import Progress

Kind = Literal["image_generation", "image_edit"]

HEARTBEAT = b": still at work\n\n"
"""A comment: clients skip it, and what stands between sees that the connection lives."""


class _ImageEvent(BaseModel):
    """What OpenAI's two events share; `index` tells the images of one request apart."""

    index: int = Field(description="Which image of `n`, from 0.")
    created_at: int = Field(description="Unix time in seconds.")
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat


class PartialImageEvent(_ImageEvent):
    """An image on its way: the model's estimate of the end at this step."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str
    partial_image_index: int = Field(description="Which preview of its image, from 0.")


class CompletedEvent(_ImageEvent, ImageReply):
    """A finished image, with all that the JSON reply says of it."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage = Field(description="Of this image with the prompt.")
    warnings: list[str]


class ProgressEvent(BaseModel):
    """Where an image stands; sent with `progress: true` only, since OpenAI's clients know no such event."""

    type: Literal["flux.progress"] = "flux.progress"
    index: int = Field(description="Which image of `n`, from 0.")
    step: int = Field(description="Steps done, 0 while it waits.")
    steps: int
    decision: str = Field(description="`C` computed or `.` reused: the last step done; empty while it waits.")
    eta_s: float = Field(description="Estimated seconds to the last step.")
    queue_position: int = Field(description="Images admitted before it, itself counted; 0 once it runs.")
    schedule: str = Field(
        description="One letter a step, of those done and to come; a deadline or load may lower it while it waits."
    )
    negative_schedule: str | None = Field(description="The same of the negative prompt's branch under true CFG.")
    predicted_error: float | None = Field(description="Of the schedule, as in the reply.")

    _finite = field_validator("predicted_error", mode="before")(finite)


class ErrorEvent(BaseModel):
    """The end of a stream that failed after its first byte."""

    type: Literal["error"] = "error"
    error: ErrorBody


STREAM_EVENTS = (PartialImageEvent, CompletedEvent, ProgressEvent, ErrorEvent)


def event_of(resolved: ResolvedRequest, item: StreamItem, kind: Kind = "image_generation") -> bytes | None:
    """``item`` as a server-sent event; None when the client did not ask for its kind."""
    if isinstance(item, Progress):
        return sse_event(ProgressEvent.model_validate(item, from_attributes=True)) if resolved.progress else None
    job = resolved.job
    common = {
        "created_at": int(time.time()),
        "size": resolved.size,
        "quality": resolved.quality,
        "output_format": job.output_format,
    }
    if isinstance(item, Preview):
        return sse_event(
            PartialImageEvent.model_validate(
                {
                    "type": f"{kind}.partial_image",
                    "index": item.index,
                    "b64_json": base64.b64encode(item.data).decode("ascii"),
                    "partial_image_index": item.partial_index,
                    **common,
                }
            )
        )
    return sse_event(
        CompletedEvent.model_validate(
            {
                "type": f"{kind}.completed",
                "index": item.seed - job.seed,
                **image_reply(resolved, item).model_dump(),
                "usage": usage(resolved, [item]).model_dump(),
                "warnings": all_warnings(resolved, [item]),
                **common,
            }
        )
    )


def stream_headers(resolved: ResolvedRequest, first: StreamItem | None) -> dict[str, str]:
    """What is known of a request when the reply to it begins; ``first`` is its first item, if it came in time."""
    headers = {
        "X-Size": resolved.size,
        "X-Seed": ", ".join(str(resolved.job.seed + index) for index in range(resolved.job.n)),
        "X-MagCache-Enabled": str(resolved.job.magcache.enabled).lower(),
    }
    if isinstance(first, Progress):
        headers |= {"X-Eta-Seconds": f"{first.eta_s:.3f}", "X-Queue-Position": str(first.queue_position)}
    if resolved.warnings:
        headers["X-Warnings"] = "; ".join(resolved.warnings)
    return headers


def error_event(error: ServiceError) -> bytes:
    """``error`` as the last event of a stream, in the envelope that it would have as a reply."""
    return sse_event(ErrorEvent(error=ErrorBody.model_validate(error.envelope["error"])))


def event_schema(*events: type[BaseModel]) -> dict[str, Any]:
    """One of ``events`` as OpenAPI sees it: an object of a server-sent event's fields, whose data are JSON as text."""
    schemas = [{"$ref": f"#/components/schemas/{event.__name__}"} for event in events]
    return {
        "type": "object",
        "description": "Of each server-sent event.",
        "properties": {
            "event": {"type": "string", "description": "The `type` in its data."},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"oneOf": schemas}},
        },
        "required": ["event", "data"],
    }


def sse_event(event: BaseModel) -> bytes:
    """``event``, which has a field ``type``, as a server-sent event."""
    content = event.model_dump()
    return b"event: %s\ndata: %s\n\n" % (content["type"].encode("ascii"), ascii_json(content))
