"""Multipart bodies: text fields become the values that JSON would have had, files become bytes. Both are bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from app.api.bodies import bounded
from app.errors import InvalidRequestError

_MAX_FILES = 16
_MAX_FIELDS = 64
_ALIASES = {"cfg_scale": "true_cfg_scale"}


async def read_form(request: Request, max_bytes: int, count: Callable[[int], None]) -> list[tuple[str, str | bytes]]:
    """The parts of the request's multipart body in their order: text of fields, bytes of files.

    Args:
        max_bytes: of the whole body; files beyond a megabyte wait on disk meanwhile.
        count: told of the bytes of each chunk, see `bounded`.

    Raises:
        InvalidRequestError: the body is broken or too large.

    A field without a value, and a file without a name and content, count as absent.
    """
    parser = MultiPartParser(
        request.headers,
        bounded(request, max_bytes, count),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=max_bytes,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"the multipart body is wrong: {error.message}", code="invalid_form") from error
    parts: list[tuple[str, str | bytes]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                parts += [(name, value)] if value.strip() else []  # an empty field of a form is no wish
            elif value.filename or value.size:
                parts.append((name, await value.read()))
    finally:
        await form.close()
    return parts


def coerce_form_fields(
    fields: Iterable[tuple[str, str]], schema: type[BaseModel], max_field_bytes: int
) -> dict[str, Any]:
    """Text fields as ``schema`` takes them from JSON.

    Text that should be a number, a switch or an object is read as JSON, a switch in any case; what isn't any stays
    text, for the schema to refuse by name. ``magcache[enabled]``, as OpenAI's client writes nested fields, is
    ``enabled`` within ``magcache``.

    Raises:
        InvalidRequestError: a field is there twice, or has more than ``max_field_bytes``.
    """
    body: dict[str, Any] = {}
    seen: set[str] = set()
    for name, text in fields:
        if name in seen:
            raise InvalidRequestError(f"{name[:80]} is given twice", param=name[:80])
        seen.add(name)
        if len(text.encode("utf-8", "surrogateescape")) > max_field_bytes:
            raise InvalidRequestError(
                f"{name[:80]} has more than {max_field_bytes} bytes", param=name[:80], code="body_too_large", status=413
            )
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
