"""The OpenAPI document: FastAPI's, with the bodies that are read by hand and with this server's own limits in them."""

from __future__ import annotations

import copy
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api.calibration_status import CalibrationEvent
from app.api.calibrations import CalibrationRequest
from app.api.events import STREAM_EVENTS
from app.api.schemas import EditsRequest, ImagesRequest
from app.settings import SamplingSettings, Settings

Schema = dict[str, Any]

_FILE: Schema = {"type": "string", "format": "binary"}
_TEXT_FILE: Schema = {"type": "string", "minLength": 1, "description": "A `data:` URL, or base64."}
_CARRIED: Schema = {
    "anyOf": [
        _TEXT_FILE,
        {
            "type": "object",
            "properties": {"image_url": _TEXT_FILE},
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ]
}
_FORM_IMAGES: Schema = {
    "image": _FILE | {"description": "PNG, JPEG or WebP; further fields and forms are in docs/api.md."},
    "image[]": {"type": "array", "items": _FILE, "description": "Several images, for models that take several."},
}
_JSON_IMAGES: Schema = {
    "image": _CARRIED,
    "images": {"type": "array", "items": _CARRIED, "minItems": 1, "description": "Where the model takes several."},
}
_MASK = "Of the image's size: transparent, or else white, where the image is painted anew."
_ENCODING: Schema = {name: {"contentType": "image/png, image/jpeg, image/webp"} for name in (*_FORM_IMAGES, "mask")}


def openapi_of(app: FastAPI, settings: Settings) -> Schema:
    """The document of ``app``; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        components = document["components"]["schemas"]
        components.update(_definitions())
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
        for path in document["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("ImagesRequest", "EditsRequest"):
            _limit(components[name], components["MagCacheBody"], settings)
        default_size = f"{settings.sampling.default_width}x{settings.sampling.default_height}"
        components["ImagesRequest"]["properties"]["size"]["default"] = default_size
        _within(components["LoraBody"]["properties"]["scale"], _lora_scales(settings))
        edits = components.pop("EditsRequest")
        components["EditsForm"] = _with_images(_without_null(edits), _FORM_IMAGES, _FILE)
        components["EditsJson"] = _with_images(edits, _JSON_IMAGES, _CARRIED)
        app.openapi_schema = document
    return app.openapi_schema


EDITS_BODY: Schema = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/EditsForm"}, "encoding": _ENCODING},
        "application/json": {"schema": {"$ref": "#/components/schemas/EditsJson"}},
    },
}
"""Of the route that is declared with it, as `openapi_extra`."""


def _definitions() -> Schema:
    by_hand: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        (ImagesRequest, "validation"),
        (EditsRequest, "validation"),
        (CalibrationRequest, "validation"),
    ]
    by_hand += [(event, "serialization") for event in (*STREAM_EVENTS, CalibrationEvent)]
    _, definitions = models_json_schema(by_hand, ref_template="#/components/schemas/{model}", by_alias=False)
    found: Schema = definitions["$defs"]
    return found


def _limit(body: Schema, magcache: Schema, settings: Settings) -> None:
    """Write into a request's schema what `resolve_request` holds it to."""
    sampling, fields = settings.sampling, body["properties"]
    prompts = {"maxLength": settings.http.max_prompt_chars}
    fields["prompt"] |= prompts | {"minLength": 1, "pattern": r"\S"}
    _within(fields["negative_prompt"], prompts)
    _within(fields["n"], {"maximum": sampling.max_n})
    _within(fields["num_inference_steps"], {"maximum": sampling.max_inference_steps})
    _within(fields["size"], {"pattern": _size_pattern(sampling)})
    fields["num_inference_steps"]["default"] = sampling.num_inference_steps
    fields["guidance_scale"]["default"] = sampling.guidance_scale
    _within(fields["lora"], {"maxItems": settings.max_loras if settings.loras else 0})
    _within(fields["model"], {"enum": [*settings.model_names, ""]})
    _within(fields["output_format"], {"enum": [*_choices(fields["output_format"]), "jpg"]})
    fields["cfg_scale"] = copy.deepcopy(fields["true_cfg_scale"])
    for name in ("computed_steps", "min_computed_steps"):
        _within(magcache["properties"][name], {"maximum": sampling.max_inference_steps})


def _lora_scales(settings: Settings) -> Schema:
    return {"minimum": -settings.max_lora_scale, "maximum": settings.max_lora_scale}


def _within(field: Schema, limits: Schema) -> None:
    """Add ``limits`` to a field that may be null."""
    field["anyOf"][0].update(limits)


def _choices(field: Schema) -> list[str]:
    choices: list[str] = field["anyOf"][0]["enum"]
    return [choice for choice in choices if choice != "jpg"]


def _size_pattern(limits: SamplingSettings) -> str:
    """What `size` may be: all pairs of sides within the limits."""
    sides = range(
        -(-limits.min_side // limits.side_multiple) * limits.side_multiple, limits.max_side + 1, limits.side_multiple
    )
    widths: dict[int, list[int]] = {}  # by the longest height that goes with them
    for width in sides:
        heights = [side for side in sides if side * width <= limits.max_pixels]
        if heights:
            widths.setdefault(heights[-1], []).append(width)
    pairs = (
        f"({_any_of(group)})x({_any_of(side for side in sides if side <= longest)})"
        for longest, group in widths.items()
    )
    return f"^(auto|{'|'.join(pairs)})$"


def _any_of(sides: Any) -> str:
    return "|".join(map(str, sides))


def _without_null(body: Schema) -> Schema:
    """``body`` for a form, whose fields have no null."""
    fields = copy.deepcopy(body["properties"])
    for field in fields.values():
        if "anyOf" in field:
            field |= field.pop("anyOf")[0]
    return body | {"properties": fields}


def _with_images(fields: Schema, images: Schema, mask: Schema) -> Schema:
    """The schema of an edit's body: one of ``images`` beside the fields, and perhaps a mask."""
    either = [{"required": [name]} for name in images]
    properties = fields["properties"] | images | {"mask": mask | {"description": _MASK}}
    return fields | {"properties": properties, "anyOf": either}
