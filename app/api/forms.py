"""Multipart bodies: text fields become the values that JSON would have had, files become bytes. Both are bounded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from app.api.bodies import bounded, require_media_type
from app.errors import InvalidRequestError

_MAX_FILES = 16
_MAX_FIELDS = 64
_ALIASES = {"cfg_scale": "true_cfg_scale"}


@dataclass(frozen=True)
class Form:
    """A multipart body: text fields as ``name -> text`` and files as (field name, content), in their order."""

    fields: dict[str, str]
    files: tuple[tuple[str, bytes], ...]


async def read_form(request: Request, max_bytes: int, max_field_bytes: int) -> Form:
    """The request's multipart body.

    Args:
        max_bytes: of the whole body; files beyond a megabyte wait on disk meanwhile.
        max_field_bytes: of one text field.

    Raises:
        InvalidRequestError: another type of body, a broken or too large one, or a field that is there twice.

    A field without a value counts as absent.
    """
    require_media_type(request, "multipart/form-data", "multipart/form-data with the image in the field image")
    parser = MultiPartParser(
        request.headers,
        bounded(request, max_bytes),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=max_field_bytes,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"the multipart body is wrong: {error.message}", code="invalid_form") from error
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if value.filename or value.size:
                    files.append((name, await value.read()))
            elif not value.strip():
                continue  # an empty field of a form is no wish
            elif name in fields:
                raise InvalidRequestError(f"{name[:80]} is given twice", param=name[:80])
            else:
                fields[name] = value
    finally:
        await form.close()
    return Form(fields, tuple(files))


def coerce_form_fields(fields: dict[str, str], schema: type[BaseModel]) -> dict[str, Any]:
    """Text fields as ``schema`` takes them from JSON.

    Text that should be a number, a switch or an object is read as JSON, a switch in any case; what isn't any stays
    text, for the schema to refuse by name. ``magcache[enabled]``, as OpenAI's client writes nested fields, is
    ``enabled`` within ``magcache``.
    """
    body: dict[str, Any] = {}
    for name, text in fields.items():
        nested = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        if nested is None:
            body[name] = _value(text, schema, name)
        else:
            outer = body.setdefault(nested[1], {})
            if not isinstance(outer, dict):
                raise InvalidRequestError(f"{nested[1]} is given twice", param=nested[1])
            outer[nested[2]] = _json(text)
    return body


def _value(text: str, schema: type[BaseModel], name: str) -> Any:
    field = schema.model_fields.get(_ALIASES.get(name, name))
    return text if field is not None and _takes_text(field.annotation) else _json(text)


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    return annotation is str or any(_takes_text(part) for part in get_args(annotation))


def _json(text: str) -> Any:
    switch = {"true": True, "false": False}.get(text.strip().lower())
    if switch is not None:
        return switch  # Python clients send False
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
