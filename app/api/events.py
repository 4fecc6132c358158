"""The events of a stream, as OpenAI's image streaming has them, and this service's own beside them."""

from __future__ import annotations

import base64
import time
from typing import Literal

from pydantic import BaseModel, Field

from app.api.backend import OutputFormat, Preview, Progress, StreamItem
from app.api.errors import ServiceError
from app.api.jobs import Ask
from app.api.replies import ascii_json, image_reply, usage
from app.api.schemas import ErrorBody, ImageReply, Quality, Usage

Kind = Literal["image_generation", "image_edit"]

HEARTBEAT = b": still at work\n\n"
"""A comment: clients skip it, and what stands between sees that the connection lives."""


class _PictureEvent(BaseModel):
    """What OpenAI's two events share; `index` tells the pictures of one request apart."""

    index: int = Field(description="Which picture of `n`, from 0.")
    created_at: int = Field(description="Unix time in seconds.")
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat


class PartialImageEvent(_PictureEvent):
    """A picture on its way: the model's estimate of the end at this step."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str
    partial_image_index: int = Field(description="Which preview of its picture, from 0.")


class CompletedEvent(_PictureEvent, ImageReply):
    """A finished picture, with all that the JSON reply says of it."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage = Field(description="Of this picture with the prompt.")
    warnings: list[str]


class ProgressEvent(BaseModel):
    """Where a picture stands; sent with `progress: true` only, since OpenAI's clients know no such event."""

    type: Literal["flux.progress"] = "flux.progress"
    index: int = Field(description="Which picture of `n`, from 0.")
    step: int = Field(description="Steps done, 0 while it waits.")
    steps: int
    decision: str = Field(description="`C` computed or `.` reused: the last step done; empty while it waits.")
    eta_s: float = Field(description="Estimated seconds to the last step.")
    queue_position: int = Field(description="Pictures admitted before it, itself counted; 0 once it runs.")


class ErrorEvent(BaseModel):
    """The end of a stream that failed after its first byte."""

    type: Literal["error"] = "error"
    error: ErrorBody


STREAM_EVENTS = (PartialImageEvent, CompletedEvent, ProgressEvent, ErrorEvent)


def event_of(ask: Ask, item: StreamItem, kind: Kind = "image_generation") -> bytes | None:
    """``item`` as a server-sent event; None when the client did not ask for its kind."""
    if isinstance(item, Progress):
        return _sse(ProgressEvent(**vars(item))) if ask.progress else None
    job = ask.job
    common = {
        "created_at": int(time.time()),
        "size": ask.size,
        "quality": ask.quality,
        "output_format": job.output_format,
    }
    if isinstance(item, Preview):
        return _sse(
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
    return _sse(
        CompletedEvent.model_validate(
            {
                "type": f"{kind}.completed",
                "index": item.seed - job.seed,
                **image_reply(job, item).model_dump(),
                "usage": usage(ask, [item]).model_dump(),
                "warnings": ask.warnings,
                **common,
            }
        )
    )


def error_event(error: ServiceError) -> bytes:
    """``error`` as the last event of a stream, in the envelope that it would have as a reply."""
    return _sse(ErrorEvent(error=ErrorBody.model_validate(error.envelope["error"])))


def _sse(event: BaseModel) -> bytes:
    content = event.model_dump()
    return b"event: %s\ndata: %s\n\n" % (content["type"].encode("ascii"), ascii_json(content))
