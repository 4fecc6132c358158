"""From finished pictures to HTTP replies, in OpenAI's JSON or as the bare file; both carry the numbers in headers."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from app.api.backend import ImagesJob, Picture
from app.api.errors import ServiceError
from app.api.jobs import Ask
from app.api.schemas import ImageReply, ImagesReply, MagCacheReply, Timings, TokenDetails, Usage
from app.engine.geometry import Geometry


class AsciiJSONResponse(Response):
    """JSON with everything beyond ASCII escaped: a client's broken text comes back without breaking the reply."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return ascii_json(content)


def ascii_json(content: Any) -> bytes:
    """``content`` as compact JSON on one line."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: ServiceError) -> Response:
    """``error`` in OpenAI's envelope."""
    return AsciiJSONResponse(error.envelope, status_code=error.status, headers=error.headers)


def timings(picture: Picture) -> Timings:
    """Seconds by phase of one picture."""
    return Timings(
        queue_s=picture.report.queue_seconds,
        encode_s=picture.encode_seconds,
        denoise_s=picture.report.denoise_seconds,
        decode_s=picture.decode_seconds,
        total_s=picture.total_seconds,
    )


def pictures_response(ask: Ask, pictures: list[Picture]) -> Response:
    """The reply in the form that the client asked for."""
    headers = _headers(ask, pictures)
    if ask.as_file:
        return Response(pictures[0].data, media_type=f"image/{ask.job.output_format}", headers=headers)
    reply = ImagesReply(
        created=int(time.time()),
        data=[image_reply(ask.job, picture) for picture in pictures],
        output_format=ask.job.output_format,
        quality=ask.quality,
        size=ask.size,
        usage=usage(ask, pictures),
        warnings=list(ask.warnings),
    )
    return AsciiJSONResponse(reply.model_dump(), headers=headers)


def usage(ask: Ask, pictures: Sequence[Picture]) -> Usage:
    """Tokens of ``ask``'s prompts, of the pictures that it sent, and of those that it gets."""
    sources = pictures[0].source_tokens
    output = len(pictures) * Geometry.of(ask.job.width, ask.job.height).tokens
    return Usage(
        input_tokens=ask.text_tokens + sources,
        output_tokens=output,
        total_tokens=ask.text_tokens + sources + output,
        input_tokens_details=TokenDetails(text_tokens=ask.text_tokens, image_tokens=sources),
    )


def image_reply(job: ImagesJob, picture: Picture) -> ImageReply:
    """One picture as JSON has it."""
    report = picture.report
    return ImageReply(
        b64_json=base64.b64encode(picture.data).decode("ascii"),
        seed=picture.seed,
        magcache=MagCacheReply(
            enabled=job.magcache.enabled,
            schedule=report.schedule,
            computed=report.computed,
            skipped=report.skipped,
            predicted_error=_finite(report.predicted_error),
            negative_schedule=report.negative_schedule,
            lowered_by=report.lowered_by,  # type: ignore[arg-type]  # the scheduler's two words
            uncached_reason=report.uncached_reason,
        ),
        timings=timings(picture),
        eta_s=report.eta_seconds,
        queue_position=report.queue_position,
    )


def _finite(error: float) -> float | None:
    """Infinity is what the profile says of a reuse longer than any that it measured, and JSON has no such number."""
    return error if math.isfinite(error) else None


def _headers(ask: Ask, pictures: list[Picture]) -> dict[str, str]:
    """What the JSON says of the pictures; with several of them a value for each, in their order."""
    reports = [picture.report for picture in pictures]
    slowest = max((timings(picture).model_dump() for picture in pictures), key=lambda phases: phases["total_s"])
    values: dict[str, list[str | None]] = {
        "X-Seed": [str(picture.seed) for picture in pictures],
        "X-Eta-Seconds": [f"{report.eta_seconds:.3f}" for report in reports],
        "X-Queue-Position": [str(report.queue_position) for report in reports],
        "X-MagCache-Schedule": [report.schedule for report in reports],
        "X-MagCache-Negative-Schedule": [report.negative_schedule for report in reports],
        "X-MagCache-Computed": [str(report.computed) for report in reports],
        "X-MagCache-Skipped": [str(report.skipped) for report in reports],
        "X-MagCache-Predicted-Error": [
            None if error is None else f"{error:.6g}"
            for error in (_finite(report.predicted_error) for report in reports)
        ],
        "X-MagCache-Lowered-By": [report.lowered_by for report in reports],
        "X-MagCache-Uncached-Reason": [report.uncached_reason for report in reports[:1]],
    }
    headers = {
        "X-Size": ask.size,
        "X-MagCache-Enabled": str(ask.job.magcache.enabled).lower(),
        "Server-Timing": ", ".join(f"{name[:-2]};dur={value * 1000:.1f}" for name, value in slowest.items()),
    }
    for name, of_each in values.items():
        if any(value is not None for value in of_each):
            headers[name] = ", ".join("none" if value is None else value for value in of_each)
    if ask.warnings:
        headers["X-Warnings"] = "; ".join(ask.warnings)
    return headers
