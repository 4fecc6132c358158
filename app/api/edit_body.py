"""The body of an edit, a form or JSON: its fields, and its images under the names and in the forms that clients use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from app.api.bodies import media_type_of, unsupported_media_type
from app.api.data_urls import check_is_carried, decode_file
from app.api.forms import coerce_form_fields, read_form
from app.api.schemas import EditsRequest
from app.api.unknown_fields import explain_file
from app.api.validation import read_json
from app.errors import InvalidRequestError
from app.settings import HttpSettings

FORM, JSON = "multipart/form-data", "application/json"
_IMAGES = {"image", "images", "image_url", "image_urls", "url"}
_MASKS = {"mask", "masks", "mask_url"}
# `image`, `image[]`, `image[0]`, `image[image_url]`, `images[0][image_url]`, ...
_NAME = re.compile(r"(?P<name>\w{1,32})(\[(?P<index>[0-9]{0,3})\])?(\[(?P<key>[a-z][a-z0-9_]{0,31})\])?")
_KEYS = ("image_url", "url", "b64_json")
_LABELS = ("type", "detail")  # of parts in OpenAI's other APIs


@dataclass(frozen=True)
class Upload:
    """One file: its bytes, or the text that holds them. ``param`` is what errors call it."""

    param: str
    content: bytes | str

    def file(self) -> bytes:
        """The file's bytes.

        Raises:
            InvalidRequestError: the text holds no file.
        """
        return self.content if isinstance(self.content, bytes) else decode_file(self.content, self.param)


@dataclass(frozen=True)
class EditBody:
    """``fields`` are the values that `EditsRequest` takes; images and masks stand in the client's order."""

    fields: dict[str, Any]
    images: tuple[Upload, ...]
    masks: tuple[Upload, ...]


async def read_edit(request: Request, http: HttpSettings, count: Callable[[int], None]) -> EditBody:
    """The body of an edit; ``count`` is told of its bytes as they come, and may raise to end the reading.

    Raises:
        InvalidRequestError: it is of another type, broken or too large, a file has a name that means nothing here, or
            an image is given by its address instead of its content.
    """
    media_type = media_type_of(request)
    if media_type == FORM:
        parts = await read_form(request, http.max_edit_bytes, count)
        settings = [(name, value) for name, value in parts if isinstance(value, str) and _kind(name) is None]
        fields = coerce_form_fields(settings, EditsRequest, http.max_body_bytes)
        files = [(name, _of_form(value)) for name, value in parts if isinstance(value, bytes) or _kind(name)]
    elif media_type in (JSON, ""):
        body = await read_json(request, http.max_edit_bytes, count)
        fields = {name: value for name, value in body.items() if _kind(name) is None}
        files = [(name, value) for name, value in body.items() if _kind(name)]
    else:
        raise unsupported_media_type(media_type, f"{FORM} with the image in the field image, or {JSON}")
    return EditBody(fields, _uploads("image", files), _uploads("mask", files))


def _kind(name: str) -> str | None:
    found = _NAME.fullmatch(name)
    if found is None or found["name"] not in _IMAGES | _MASKS:
        return None
    return "image" if found["name"] in _IMAGES else "mask"


def _of_form(value: str | bytes) -> Any:
    """Text that is a list or an object in JSON as that, other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _uploads(kind: str, files: Iterable[tuple[str, Any]]) -> tuple[Upload, ...]:
    """The files of one ``kind``; numbered fields (``image[1]``) are sorted by their numbers, after the others."""
    found: list[tuple[int, Any]] = []
    for name, value in files:
        match = _NAME.fullmatch(name)
        if _kind(name) is None or match is None:
            raise InvalidRequestError(explain_file(name), param=name[:80], code="unknown_parameter")
        if _kind(name) == kind:
            value = {match["key"]: value} if match["key"] else value
            found += [(int(match["index"] or -1), content) for content in _contents(name, value)]
    found.sort(key=lambda entry: entry[0])
    names = [kind] if len(found) == 1 else [f"{kind}[{index}]" for index in range(len(found))]
    return tuple(Upload(name, content) for name, (_, content) in zip(names, found, strict=True))


def _contents(param: str, value: Any) -> Iterator[bytes | str]:
    """What a field holds: one image or a list of them; null and empty text count as absent."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _content(f"{param}[{index}]", one)
    else:
        yield from _content(param, value)


def _content(param: str, value: Any) -> Iterator[bytes | str]:
    value = _pointed_at(param, value) if isinstance(value, dict) else value
    # OpenAI's chat API nests one object more: {"image_url": {"url": ...}}.
    value = _pointed_at(param, value) if isinstance(value, dict) else value
    if value is None or (isinstance(value, str) and not value.strip()):
        return
    if not isinstance(value, bytes | str):
        raise InvalidRequestError(f"{param} must be an image: a data URL, or an object with image_url", param=param)
    if isinstance(value, str):
        check_is_carried(value, param)
    yield value


def _pointed_at(param: str, value: dict[str, Any]) -> Any:
    """What an object says its image is.

    Raises:
        InvalidRequestError: it names a stored file, or something that is not known here.
    """
    given = {name: one for name, one in value.items() if one is not None and name not in _LABELS}
    if "file_id" in given:
        raise InvalidRequestError(
            f"{param}.file_id: this service stores no files; send image_url with a data URL", param=param
        )
    if len(given) != 1 or not given.keys() <= set(_KEYS):
        names = ", ".join(repr(name[:40]) for name in list(given)[:4]) or "nothing"
        raise InvalidRequestError(f"{param} must have one of {', '.join(_KEYS)}, not {names}", param=param)
    return next(iter(given.values()))
