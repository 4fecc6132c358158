"""From finished images to HTTP replies, in OpenAI's JSON or as the bare file; both carry the numbers in headers."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from app.api.backend import GeneratedImage
from app.api.loras import lora_replies
from app.api.resolve import ResolvedRequest
from app.api.schemas import ImageReply, ImagesReply, MagCacheReply, Timings, TokenDetails, Usage
from app.engine.geometry import Geometry
from app.errors import ServiceError


class AsciiJSONResponse(Response):
    """JSON with everything beyond ASCII escaped: a client's broken text comes back without breaking the reply."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return ascii_json(content)


def ascii_json(content: Any) -> bytes:
    """``content`` as compact JSON on one line."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: ServiceError) -> Response:
    """``error`` in OpenAI's envelope; what is the service's fault says when to ask again."""
    headers = {"Retry-After": "1"} | error.headers if error.status >= 500 else error.headers
    return AsciiJSONResponse(error.envelope, status_code=error.status, headers=headers)


def images_response(resolved: ResolvedRequest, images: list[GeneratedImage]) -> Response:
    """The reply in the form that the client asked for."""
    headers = _headers(resolved, images)
    if resolved.as_file:
        return Response(images[0].data, media_type=f"image/{resolved.job.output_format}", headers=headers)
    reply = ImagesReply(
        created=int(time.time()),
        data=[image_reply(resolved, image) for image in images],
        output_format=resolved.job.output_format,
        quality=resolved.quality,
        size=resolved.size,
        usage=usage(resolved, images),
        warnings=all_warnings(resolved, images),
    )
    return AsciiJSONResponse(reply.model_dump(), headers=headers)


def all_warnings(resolved: ResolvedRequest, images: Sequence[GeneratedImage]) -> list[str]:
    """What the request asked for without effect, as far as it is known now."""
    warnings = list(resolved.warnings)
    for name, count in zip(("prompt", "negative_prompt"), images[0].prompts, strict=False):
        if count.read < count.given:
            warnings.append(f"{name} is cut: {count.read} of its {count.given} tokens are read")
        if count.clip_read < count.clip_given:
            warnings.append(
                f"{name} is cut for CLIP: {count.clip_read} of its {count.clip_given} tokens are read there"
            )
    reason = images[0].report.uncached_reason
    if reason is not None and resolved.quality != "auto":
        warnings.append(f"quality {resolved.quality!r} is ignored and every step computed: {reason}")
    return warnings


def usage(resolved: ResolvedRequest, images: Sequence[GeneratedImage]) -> Usage:
    """Tokens of the request's prompts, of the images that it sent, and of those that it gets."""
    sources = images[0].source_tokens
    text = sum(count.read for count in images[0].prompts)
    output = len(images) * Geometry.of(resolved.job.width, resolved.job.height).tokens
    return Usage(
        input_tokens=text + sources,
        output_tokens=output,
        total_tokens=text + sources + output,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=sources),
    )


def image_reply(resolved: ResolvedRequest, image: GeneratedImage) -> ImageReply:
    """One image as JSON has it."""
    report, job = image.report, resolved.job
    content = base64.b64encode(image.data).decode("ascii")
    return ImageReply(
        b64_json=content if resolved.as_b64 else None,
        url=f"data:image/{job.output_format};base64,{content}" if resolved.as_url else None,
        seed=image.seed,
        magcache=MagCacheReply(
            enabled=job.magcache.enabled,
            schedule=report.schedule,
            computed=report.computed,
            skipped=report.skipped,
            predicted_error=finite(report.predicted_error),
            predicted_psnr_db=_rounded(report.predicted_psnr_db),
            quality_floor_db=report.floor_db,
            negative_schedule=report.negative_schedule,
            lowered_by=report.lowered_by,  # type: ignore[arg-type]  # the scheduler's two words
            uncached_reason=report.uncached_reason,
            profile=report.profile,
            plan_reason=report.plan_reason,
        ),
        lora=lora_replies(job.loras),
        timings=Timings(**image.phases),
        eta_s=report.eta_seconds,
        queue_position=report.queue_position,
    )


def finite(error: float) -> float | None:
    """Infinity is what the profile says of a reuse longer than any that it measured, and JSON has no such number."""
    return error if math.isfinite(error) else None


def _rounded(decibels: float | None) -> float | None:
    return None if decibels is None else round(decibels, 1)


def _headers(resolved: ResolvedRequest, images: list[GeneratedImage]) -> dict[str, str]:
    """What the JSON says of the images; with several of them a value for each, in their order."""
    reports = [image.report for image in images]
    slowest = max((image.phases for image in images), key=lambda phases: phases["total_s"])
    values: dict[str, list[str | None]] = {
        "X-Seed": [str(image.seed) for image in images],
        "X-Eta-Seconds": [f"{report.eta_seconds:.3f}" for report in reports],
        "X-Queue-Position": [str(report.queue_position) for report in reports],
        "X-MagCache-Schedule": [report.schedule for report in reports],
        "X-MagCache-Negative-Schedule": [report.negative_schedule for report in reports],
        "X-MagCache-Computed": [str(report.computed) for report in reports],
        "X-MagCache-Skipped": [str(report.skipped) for report in reports],
        "X-MagCache-Predicted-Error": [
            None if error is None else f"{error:.6g}"
            for error in (finite(report.predicted_error) for report in reports)
        ],
        "X-MagCache-Predicted-PSNR": [
            None if report.predicted_psnr_db is None else f"{report.predicted_psnr_db:.1f}" for report in reports
        ],
        "X-MagCache-Quality-Floor": [
            None if report.floor_db is None else f"{report.floor_db:g}" for report in reports[:1]
        ],
        "X-MagCache-Lowered-By": [report.lowered_by for report in reports],
        "X-MagCache-Uncached-Reason": [report.uncached_reason for report in reports[:1]],
        "X-MagCache-Profile": [report.profile for report in reports[:1]],
        "X-MagCache-Plan-Reason": [report.plan_reason for report in reports[:1]],
    }
    headers = {"Idempotent-Replayed": "true"} if any(image.joined for image in images) else {}
    headers |= {
        "X-Size": resolved.size,
        "X-MagCache-Enabled": str(resolved.job.magcache.enabled).lower(),
        "Server-Timing": ", ".join(f"{name[:-2]};dur={value * 1000:.1f}" for name, value in slowest.items()),
    }
    if resolved.job.loras:  # names may have any character, and headers not
        headers["X-Lora"] = ", ".join(f"{quote(use.name)}:{use.scale:g}" for use in resolved.job.loras)
    for name, of_each in values.items():
        if any(value is not None for value in of_each):
            headers[name] = ", ".join("none" if value is None else value for value in of_each)
    if warnings := all_warnings(resolved, images):
        headers["X-Warnings"] = "; ".join(warnings)
    return headers
