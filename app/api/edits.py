"""`POST /v1/images/edits`: OpenAI's dialect, for models that refer to images or start from one."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.backend import SourcePixels
from app.api.edit_body import EditBody, read_edit
from app.api.idempotency import body_digest
from app.api.image_memory import ImageMemory
from app.api.middleware import EDITS_PATH
from app.api.openapi import EDITS_BODY
from app.api.resolve import ResolvedRequest, resolve_request
from app.api.routes import IMAGES_RESPONSES, Service, answer, key_name_of, model_in_path
from app.api.schemas import EditsRequest
from app.api.uploads import Fit, UploadHead, read_head, read_mask, read_upload, size_like
from app.api.validation import parse
from app.engine.families import Edits, Family
from app.engine.source_fit import fit_source
from app.errors import InvalidRequestError

router = APIRouter()

DEFAULT_STRENGTH = 0.6
"""diffusers' default for FLUX: the image's layout stays, its content follows the prompt."""
DEFAULT_MASKED_STRENGTH = 1.0
"""What a mask marks is painted from the prompt and what is around; with less, the old content shows through."""
# Two at a time: an upload may take hundreds of megabytes on its way to RGB.
_decoding = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode-upload")


@router.post(
    EDITS_PATH,
    summary="Edit images",
    tags=["images"],
    responses=dict(IMAGES_RESPONSES),
    openapi_extra={"requestBody": EDITS_BODY},
)
async def edit(request: Request) -> Response:
    """OpenAI's image editing. What becomes of the image depends on the model: Kontext and FLUX.2 read it beside the
    prompt, FLUX.1-dev starts from it (`strength`), or paints what a mask marks."""
    resolved, body = await _resolved(request)
    return await answer(request, resolved, body, "image_edit")


async def _resolved(request: Request) -> tuple[ResolvedRequest, str]:
    """The request with its sources decoded, and the digest of its body.

    All that can refuse it is asked before: its fields, room and time.
    """
    service: Service = request.app.state.service
    settings, backend = service.settings, service.get_backend()
    run, max_pixels = asyncio.get_running_loop().run_in_executor, settings.http.max_source_pixels
    with service.image_memory.claim() as arriving:
        sent = await read_edit(request, settings.http, arriving.grow)
        family = await backend.family()
        check_uploads(sent, family)
        loras = await service.loras(sent.fields)

        def resolve(
            body: EditsRequest, accept: str = "", sources: list[SourcePixels] | None = None, masked: bool = True
        ) -> ResolvedRequest:
            strength = strength_of(body, family, masked)
            request_id, key_name = request.state.request_id, key_name_of(request)
            return resolve_request(body, settings, family, request_id, accept, sources, strength, key_name, loras)

        body = parse(sent.fields | model_in_path(request), EditsRequest, resolve)
        accept = request.headers.get("accept", "")
        resolve(body, accept)  # as if there were a mask, which allows what runs more steps
        arriving.grow(sum(len(one.content) for one in (*sent.images, *sent.masks) if isinstance(one.content, str)))
        uploads = [one.content for one in (*sent.images, *sent.masks)]
        digest = await run(_decoding, body_digest, sent.fields | model_in_path(request), uploads)
        files, masks = await run(_decoding, _open, sent, max_pixels, service.image_memory)
        if body.size in (None, "auto"):
            width, height = size_like(files[0].head.width, files[0].head.height, settings.sampling)
            body = body.model_copy(update={"size": f"{width}x{height}"})
        inpaints = family.inpaints and not masks and files[0].head.may_be_transparent
        job = resolve(body, masked=inpaints or bool(masks)).job
        # Whether the image is its own mask, and how many steps run then, only its decoding shows.
        if not inpaints or body.strength is not None:
            await backend.check(job)
        fit = partial(
            fit_source, family=family, width=job.width, height=job.height, max_pixels=settings.sampling.max_pixels
        )
        read = partial(run, _decoding)
        drawn = [await read(_decode_mask, mask, fit, max_pixels, service.image_memory) for mask in masks]
        sources = [await read(_decode, file, fit, max_pixels, service.image_memory, inpaints) for file in files]
    if drawn:
        sources[0] = replace(sources[0], mask=drawn[0])
    resolved = resolve(body, accept, sources, masked=sources[0].mask is not None)
    warnings = [
        f"the transparent parts of {file.param} became white"
        for file, source in zip(files, sources, strict=True)
        if source.on_white
    ]
    if body.input_fidelity is not None:
        warnings.append(f"input_fidelity is ignored: {family.name} has no such switch")
    return replace(resolved, warnings=(*resolved.warnings, *warnings)), digest


@dataclass(frozen=True)
class _File:
    """An uploaded file and its header."""

    param: str
    data: bytes
    head: UploadHead


def _open(sent: EditBody, max_pixels: int, memory: ImageMemory) -> tuple[list[_File], list[_File]]:
    """The images of an edit and its masks, as far as their headers.

    Raises:
        InvalidRequestError: one is beyond the limits, or the mask has another size than the first image.
    """
    files = [(upload.param, upload.file()) for upload in (*sent.images, *sent.masks)]
    opened = [_File(param, data, read_head(data, param, max_pixels)) for param, data in files]
    for file in opened:
        if file.head.work_bytes > memory.limit:
            raise InvalidRequestError(
                f"{file.param} is {file.head.width}x{file.head.height}, and decoding it takes {file.head.work_bytes} "
                f"bytes, above http.max_decoded_bytes, {memory.limit}: scale it down",
                param=file.param,
            )
    images, masks = opened[: len(sent.images)], opened[len(sent.images) :]
    for mask in masks:
        sizes = [f"{file.param} is {file.head.width}x{file.head.height}" for file in (mask, images[0])]
        if (mask.head.width, mask.head.height) != (images[0].head.width, images[0].head.height):
            raise InvalidRequestError(f"{' and '.join(sizes)}; both need the same size", param=mask.param)
    return images, masks


def _decode(file: _File, fit: Fit, max_pixels: int, memory: ImageMemory, inpaints: bool) -> SourcePixels:
    with memory.claim(file.head.work_bytes):
        source = read_upload(file.data, file.param, max_pixels, fit, inpaints)
        memory.hold(source.pixels)
        if source.mask is not None:
            memory.hold(source.mask)
    return source


def _decode_mask(file: _File, fit: Fit, max_pixels: int, memory: ImageMemory) -> np.ndarray:
    with memory.claim(file.head.work_bytes):
        mask = read_mask(file.data, file.param, max_pixels, fit)
        memory.hold(mask)
    return mask


def check_uploads(sent: EditBody, family: Family) -> None:
    """Refuse images that the model cannot use.

    Raises:
        InvalidRequestError: the model edits nothing, not so many, or not by masks; there is no image, or several masks.
    """
    if family.edits is Edits.NONE:
        raise InvalidRequestError(
            f"{family.name} makes images from prompts only and edits none; POST /v1/images/generations takes prompts",
            code="edits_not_supported",
        )
    if sent.masks and not family.inpaints:
        raise InvalidRequestError(
            f"{family.name} reads the image and takes no mask: leave it out, and say in the prompt what to change",
            param="mask",
            code="unknown_parameter",
        )
    if len(sent.masks) > 1:
        raise InvalidRequestError(f"mask: {len(sent.masks)} masks were sent, an image has one", param="mask")
    if not sent.images:
        raise InvalidRequestError("image: this field is required", param="image", code="missing_required_parameter")
    if len(sent.images) > family.max_sources:
        raise InvalidRequestError(
            f"image: {len(sent.images)} images were sent, {family.name} takes at most {family.max_sources}",
            param="image",
        )


def strength_of(body: EditsRequest, family: Family, masked: bool) -> float | None:
    """The strength of image-to-image, or with a mask of inpainting; None for a model that reads its images instead.

    Raises:
        InvalidRequestError: the request names a strength and the model has none.
    """
    if family.edits is Edits.STRENGTH:
        default = DEFAULT_MASKED_STRENGTH if masked else DEFAULT_STRENGTH
        return default if body.strength is None else body.strength
    if body.strength is not None:
        raise InvalidRequestError(
            f"strength has no meaning for {family.name}, which reads the image and paints a new one; leave it out",
            param="strength",
        )
    return None
