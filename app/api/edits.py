"""`POST /v1/images/edits`: OpenAI's multipart dialect, for models that refer to images or start from one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.backend import SourcePixels
from app.api.forms import Form, coerce_form_fields, read_form
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
    form = await read_form(request, settings.http.max_edit_bytes, settings.http.max_body_bytes)
    family = await service.get_backend().family()
    images = uploads_of(form, family)

    def resolve(body: EditsRequest, accept: str = "", sources: tuple[SourcePixels, ...] = ()) -> ResolvedRequest:
        strength = strength_of(body, family)
        request_id, key_name = request.state.request_id, key_name_of(request)
        return resolve_request(body, settings, family, request_id, accept, sources, strength, key_name)

    body = parse(coerce_form_fields(form.fields, EditsRequest), EditsRequest, resolve)
    resolve(body)  # refused before anything is decoded
    in_thread = asyncio.get_running_loop().run_in_executor
    sources = [
        await in_thread(_decoding, read_upload, data, name, settings.http.max_source_pixels) for name, data in images
    ]
    if body.size in (None, "auto"):
        width, height = size_like(sources[0], settings.sampling)
        body = body.model_copy(update={"size": f"{width}x{height}"})
    resolved = resolve(body, request.headers.get("accept", ""), tuple(sources))
    if body.input_fidelity is not None:
        resolved = replace(
            resolved, warnings=(*resolved.warnings, f"input_fidelity is ignored: {family.name} has no such switch")
        )
    return await answer(request, resolved, "image_edit")


def uploads_of(form: Form, family: Family) -> list[tuple[str, bytes]]:
    """The files to edit, each with the name that errors call it by.

    Raises:
        InvalidRequestError: the model edits nothing, or not so many; there is no image, or a mask.
    """
    if family.edits is Edits.NONE:
        raise InvalidRequestError(
            f"{family.name} makes images from prompts only and edits none; POST /v1/images/generations takes prompts",
            code="edits_not_supported",
        )
    given = [(name, data) for name, data in form.files if name in ("image", "image[]")]
    for name in [name for name, _ in form.files if name not in ("image", "image[]")]:
        reason = "no model here takes masks" if name == "mask" else "images come in the field image"
        raise InvalidRequestError(f"unknown file {name[:80]!r}: {reason}", param=name[:80], code="unknown_parameter")
    for name in ("image", "image[]"):
        if name in form.fields:
            raise InvalidRequestError(f"{name} must be a file, not text", param=name)
    if not given:
        raise InvalidRequestError("image: this field is required", param="image", code="missing_required_parameter")
    if len(given) > family.max_sources:
        raise InvalidRequestError(
            f"image: {len(given)} images were sent, {family.name} takes at most {family.max_sources}", param="image"
        )
    return [("image" if len(given) == 1 else f"image[{index}]", data) for index, (_, data) in enumerate(given)]


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
