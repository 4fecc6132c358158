"""`POST /v1/images/edits`: OpenAI's dialect, for models that refer to images or start from one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.backend import SourcePixels
from app.api.edit_body import EditBody, Upload, read_edit
from app.api.middleware import EDITS_PATH
from app.api.resolve import ResolvedRequest, resolve_request
from app.api.routes import IMAGES_RESPONSES, Service, answer, key_name_of
from app.api.schemas import EditsRequest
from app.api.uploads import read_upload, size_like
from app.api.validation import parse
from app.engine.families import Edits, Family
from app.errors import InvalidRequestError

router = APIRouter()

DEFAULT_STRENGTH = 0.6
"""diffusers' default for FLUX: the image's layout stays, its content follows the prompt."""
# Two at a time: a decoded upload may take hundreds of megabytes on its way to RGB.
_decoding = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode-upload")
_IMAGE = {"type": "string", "format": "binary"}
_BODY: Mapping[str, Any] = {
    "allOf": [
        {"$ref": "#/components/schemas/EditsRequest"},
        {
            "type": "object",
            "properties": {
                "image": _IMAGE | {"description": "PNG, JPEG or WebP."},
                "image[]": {
                    "type": "array",
                    "items": _IMAGE,
                    "description": "Several images, for models that take several.",
                },
            },
        },
    ]
}


@router.post(
    EDITS_PATH,
    summary="Edit images",
    tags=["images"],
    responses=dict(IMAGES_RESPONSES),
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _BODY}}}},
)
async def edit(request: Request) -> Response:
    """OpenAI's image editing. What becomes of the image depends on the model: Kontext and FLUX.2 read it beside the
    prompt, FLUX.1-dev starts from it (`strength`)."""
    service: Service = request.app.state.service
    settings = service.settings
    sent = await read_edit(request, settings.http)
    family = await service.get_backend().family()
    check_uploads(sent, family)

    def resolve(body: EditsRequest, accept: str = "", sources: tuple[SourcePixels, ...] = ()) -> ResolvedRequest:
        strength = strength_of(body, family)
        request_id, key_name = request.state.request_id, key_name_of(request)
        return resolve_request(body, settings, family, request_id, accept, sources, strength, key_name)

    body = parse(sent.fields, EditsRequest, resolve)
    resolve(body)  # refused before anything is decoded
    in_thread = asyncio.get_running_loop().run_in_executor
    sources = [await in_thread(_decoding, _decode, upload, settings.http.max_source_pixels) for upload in sent.images]
    if body.size in (None, "auto"):
        width, height = size_like(sources[0], settings.sampling)
        body = body.model_copy(update={"size": f"{width}x{height}"})
    resolved = resolve(body, request.headers.get("accept", ""), tuple(sources))
    if body.input_fidelity is not None:
        resolved = replace(
            resolved, warnings=(*resolved.warnings, f"input_fidelity is ignored: {family.name} has no such switch")
        )
    return await answer(request, resolved, "image_edit")


def _decode(upload: Upload, max_pixels: int) -> SourcePixels:
    return read_upload(upload.file(), upload.param, max_pixels)


def check_uploads(sent: EditBody, family: Family) -> None:
    """Refuse images that the model cannot use.

    Raises:
        InvalidRequestError: the model edits nothing, or not so many; there is no image, or a mask.
    """
    if family.edits is Edits.NONE:
        raise InvalidRequestError(
            f"{family.name} makes images from prompts only and edits none; POST /v1/images/generations takes prompts",
            code="edits_not_supported",
        )
    if sent.masks:
        raise InvalidRequestError(
            "unknown file 'mask': no model here takes masks", param="mask", code="unknown_parameter"
        )
    if not sent.images:
        raise InvalidRequestError("image: this field is required", param="image", code="missing_required_parameter")
    if len(sent.images) > family.max_sources:
        raise InvalidRequestError(
            f"image: {len(sent.images)} images were sent, {family.name} takes at most {family.max_sources}",
            param="image",
        )


def strength_of(body: EditsRequest, family: Family) -> float | None:
    """The strength of image-to-image; None for a model that reads its images instead.

    Raises:
        InvalidRequestError: the request names a strength and the model has none.
    """
    if family.edits is Edits.STRENGTH:
        return DEFAULT_STRENGTH if body.strength is None else body.strength
    if body.strength is not None:
        raise InvalidRequestError(
            f"strength has no meaning for {family.name}, which reads the image and paints a new one; leave it out",
            param="strength",
        )
    return None
