"""From a well-formed request to an ``ImagesJob``: defaults, the server's limits, and what has no effect."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import get_args

from app.api.accept import media_types
from app.api.backend import ImagesJob, OutputFormat, SourcePixels
from app.api.cache_options import cache_options
from app.api.guidance import guidance_scale, true_cfg
from app.api.loras import resolve_loras
from app.api.schemas import DRAW_A_SEED, MAX_SEED, ImagesRequest, MagCacheBody, Quality
from app.engine.families import Family
from app.errors import InvalidRequestError, ModelNotFoundError
from app.messages.jobs import first_step
from app.messages.loras import LoraListing
from app.settings import SamplingSettings, Settings

# Drawn seeds stay exact in JSON readers whose only number is a double.
_DRAWN_SEEDS = 2**53
_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)
# DALL-E 3's names, and those above `high` of OpenAI's newer models.
_QUALITIES: dict[str, Quality] = {"standard": "auto", "hd": "high", "xhigh": "high", "max": "high"}
_IGNORED = ("style", "complexity", "frame_count", "frame_duration_ms", "svg")


@dataclass(frozen=True)
class ResolvedRequest:
    """A resolved request: the job, the form of its reply, and warnings of what has no effect.

    Attributes:
        as_file: the reply is the bare file.
        as_url: the JSON reply has the file as a ``data:`` URL.
        as_b64: it has the file as base64.
        stream: the reply is a stream of events, with ``progress`` of each step.
    """

    job: ImagesJob
    as_file: bool
    as_url: bool
    as_b64: bool
    stream: bool
    progress: bool
    quality: Quality
    warnings: tuple[str, ...]

    @property
    def size(self) -> str:
        """``WIDTHxHEIGHT``."""
        return f"{self.job.width}x{self.job.height}"


def resolve_request(
    request: ImagesRequest,
    settings: Settings,
    family: Family,
    request_id: str,
    accept: str = "",
    sources: list[SourcePixels] | None = None,
    strength: float | None = None,
    key_name: str = "",
    loras: LoraListing = LoraListing(),  # noqa: B008 - frozen
) -> ResolvedRequest:
    """The job that ``request`` asks for.

    Args:
        family: what kind of model is served.
        accept: the Accept header; an image type in it asks for the bare file.
        sources, strength: what an edit adds, see `ImagesJob`.
        key_name: of the API key that the request came with.
        loras: the adapters that there are.

    Raises:
        ServiceError: the request is beyond the server's limits or contradicts itself; ``param`` names the field.
    """
    if request.model and request.model not in settings.model_names:
        raise ModelNotFoundError(
            f"model {request.model[:80]!r} is not served here; this service has {settings.model_name!r}", param="model"
        )
    warnings: list[str] = []
    sampling = settings.sampling
    n = request.n or 1
    _at_most("n", n, sampling.max_n)
    steps = request.num_inference_steps or sampling.num_inference_steps
    _at_most("num_inference_steps", steps, sampling.max_inference_steps)
    check_prompt("prompt", request.prompt, settings)
    if request.negative_prompt is not None:
        check_prompt("negative_prompt", request.negative_prompt, settings, may_be_empty=True)
    width, height = parse_size(request.size, sampling)
    stream = request.stream or False
    _check_stream(request, stream)
    output_format, as_file = _reply_form(request, "" if stream else accept)
    if as_file and stream:
        raise InvalidRequestError(
            "response_format 'file' is one file, and a stream is events; ask for 'b64_json'", param="response_format"
        )
    if as_file and n != 1:
        raise InvalidRequestError(f"n is {n}, but a file reply holds one image; ask for 'b64_json'", param="n")
    if stream and request.response_format == "url":
        warnings.append("response_format 'url' is ignored: the events of a stream carry b64_json")
    warnings += [
        f"{name} is ignored: this service has no such switch" for name in _IGNORED if getattr(request, name) is not None
    ]
    if request.output_compression is not None and output_format == "png":
        warnings.append("output_compression is ignored: png is lossless")
    negative_prompt, true_cfg_scale = true_cfg(request, family, warnings)
    quality = _quality(request, warnings)
    # DALL-E's clients may read either: its reply was a URL, and OpenAI's newer models reply with base64 only.
    dalle = request.response_format is None and (request.model or "").startswith("dall-e")
    steps_to_run = steps - first_step(steps, strength)
    job = ImagesJob(
        request_id=request_id,
        prompt=request.prompt,
        negative_prompt=negative_prompt,
        n=n,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale(request, family, sampling, warnings),
        true_cfg_scale=true_cfg_scale,
        seed=_seed(request.seed, n),
        magcache=cache_options(request.magcache or MagCacheBody(), quality, settings, steps_to_run, warnings),
        output_format=output_format,
        output_compression=100 if request.output_compression is None else request.output_compression,
        priority=request.priority or 0,
        deadline_s=request.deadline_s,
        partial_images=request.partial_images or 0,
        sources=[] if sources is None else sources,
        strength=strength,
        key_name=key_name,
        metadata=settings.http.metadata if request.metadata is None else request.metadata,
        loras=resolve_loras(request.lora or [], loras, settings),
    )
    return ResolvedRequest(
        job=job,
        as_file=as_file,
        as_url=(request.response_format == "url" or dalle) and not stream,
        as_b64=request.response_format != "url" or stream,
        stream=stream,
        progress=request.progress or False,
        quality=quality,
        warnings=tuple(warnings),
    )


def _check_stream(request: ImagesRequest, stream: bool) -> None:
    for name in ("partial_images", "progress"):
        if getattr(request, name) and not stream:
            raise InvalidRequestError(f"{name} comes as events of a stream: set stream to true", param=name)


def _quality(request: ImagesRequest, warnings: list[str]) -> Quality:
    asked = request.quality or "auto"
    if asked in ("xhigh", "max"):
        warnings.append(f"quality {asked!r} is taken as 'high'; magcache.enabled false computes every step")
    return _QUALITIES.get(asked, asked)  # type: ignore[arg-type]


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidRequestError(f"{name} must be at most {limit} on this server", param=name)


def check_prompt(name: str, text: str, settings: Settings, may_be_empty: bool = False) -> None:
    """Raise an `InvalidRequestError` for a prompt that is empty, too long or no text; ``name`` is its field."""
    if not text.strip() and not may_be_empty:
        raise InvalidRequestError(f"{name} must not be empty", param=name)
    if len(text) > settings.http.max_prompt_chars:
        raise InvalidRequestError(
            f"{name} has {len(text)} characters; at most {settings.http.max_prompt_chars} are allowed", param=name
        )
    if re.search("[\ud800-\udfff]", text):  # JSON can escape them, no tokenizer takes them
        raise InvalidRequestError(f"{name} holds half of a surrogate pair, which is not text", param=name)


def parse_size(size: str | None, limits: SamplingSettings) -> tuple[int, int]:
    """Width and height that ``size`` asks for; raises an `InvalidRequestError` for what the server does not make."""
    if size is None or size == "auto":
        return limits.default_width, limits.default_height
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})x(0|[1-9][0-9]{0,5})", size)
    if match is None:
        example = f"{limits.default_width}x{limits.default_height}"
        raise InvalidRequestError(f"size must be WIDTHxHEIGHT or auto, for example {example!r}", param="size")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side % limits.side_multiple or not limits.min_side <= side <= limits.max_side:
            raise InvalidRequestError(
                f"size {size!r}: both sides must be multiples of {limits.side_multiple} from {limits.min_side} to "
                f"{limits.max_side}; the nearest to {side} is {_nearest_side(side, limits)}",
                param="size",
            )
    if width * height > limits.max_pixels:
        raise InvalidRequestError(
            f"size {size!r} has {width * height} pixels; at most {limits.max_pixels} are allowed", param="size"
        )
    return width, height


def _nearest_side(side: int, limits: SamplingSettings) -> int:
    multiple = limits.side_multiple
    return min(max((side + multiple // 2) // multiple * multiple, limits.min_side), limits.max_side)


def _reply_form(request: ImagesRequest, accept: str) -> tuple[OutputFormat, bool]:
    """The file format, and whether the reply is the bare file: ``response_format`` decides before the Accept header."""
    offered = _accepted_images(accept) if request.response_format in (None, "file") else None
    if offered is None:
        return request.output_format or "png", request.response_format == "file"
    if not offered:
        raise InvalidRequestError(
            f"the Accept header asks for an image type other than {', '.join(_FORMATS)}",
            param="Accept",
            code="not_acceptable",
            status=HTTPStatus.NOT_ACCEPTABLE,
        )
    if request.output_format is not None and request.output_format not in offered:
        raise InvalidRequestError(
            f"output_format {request.output_format!r} contradicts the Accept header {accept[:80]!r}",
            param="output_format",
        )
    return request.output_format or offered[0], True


def _accepted_images(accept: str) -> Sequence[OutputFormat] | None:
    """The formats that the Accept header asks for, best first; None when it rather takes JSON."""
    accepted = media_types(accept)
    if not accepted or not accepted[0].startswith("image/"):
        return None
    images = [media_type for media_type in accepted if media_type.startswith("image/")]
    if "image/*" in images:
        return _FORMATS
    return [fmt for media_type in images for fmt in _FORMATS if media_type == f"image/{fmt}"]


def _seed(seed: int | None, n: int) -> int:
    if seed is None or seed == DRAW_A_SEED:
        return secrets.randbelow(_DRAWN_SEEDS - n + 1)
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequestError(f"seed + n - 1 must be at most {MAX_SEED}: each image has its own seed", param="seed")
    return seed
