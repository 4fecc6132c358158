"""From finished pictures to HTTP replies, in OpenAI's JSON or as the bare file."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from starlette.responses import Response

from app.api.backend import ImagesJob, Picture
from app.api.errors import ServiceError
from app.api.jobs import Ask
from app.api.schemas import ImageReply, ImagesReply, MagCacheReply, Timings


class AsciiJSONResponse(Response):
    """JSON with everything beyond ASCII escaped: a client's broken text comes back without breaking the reply."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
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
    if ask.as_file:
        return _file(ask, pictures[0])
    reply = ImagesReply(
        created=int(time.time()),
        data=[_image(ask.job, picture) for picture in pictures],
        output_format=ask.job.output_format,
        size=f"{ask.job.width}x{ask.job.height}",
        warnings=list(ask.warnings),
    )
    return AsciiJSONResponse(reply.model_dump())


def _image(job: ImagesJob, picture: Picture) -> ImageReply:
    report = picture.report
    return ImageReply(
        b64_json=base64.b64encode(picture.data).decode("ascii"),
        seed=picture.seed,
        magcache=MagCacheReply(
            enabled=job.magcache.enabled,
            schedule=report.schedule,
            computed=report.computed,
            skipped=report.skipped,
            predicted_error=report.predicted_error,
            negative_schedule=report.negative_schedule,
        ),
        timings=timings(picture),
    )


def _file(ask: Ask, picture: Picture) -> Response:
    report, seconds = picture.report, timings(picture).model_dump()
    headers = {
        "X-Seed": str(picture.seed),
        "X-Size": f"{ask.job.width}x{ask.job.height}",
        "X-MagCache-Enabled": str(ask.job.magcache.enabled).lower(),
        "X-MagCache-Schedule": report.schedule,
        "X-MagCache-Computed": str(report.computed),
        "X-MagCache-Skipped": str(report.skipped),
        "X-MagCache-Predicted-Error": f"{report.predicted_error:.6g}",
        "Server-Timing": ", ".join(f"{name[:-2]};dur={value * 1000:.1f}" for name, value in seconds.items()),
    }
    if report.negative_schedule is not None:
        headers["X-MagCache-Negative-Schedule"] = report.negative_schedule
    if ask.warnings:
        headers["X-Warnings"] = "; ".join(ask.warnings)
    return Response(picture.data, media_type=f"image/{ask.job.output_format}", headers=headers)
