"""From the bytes of a request to an ``ImagesRequest``, or to an error that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app.api.bodies import bounded, media_type_of, unsupported_media_type
from app.api.schemas import REASONS, ImagesRequest
from app.api.unknown_fields import explain_unknown
from app.errors import InvalidRequestError, ServiceError
from app.settings import unknown_name

Body = TypeVar("Body", bound=ImagesRequest)
Plain = TypeVar("Plain", bound=BaseModel)


async def read_json(
    request: Request, max_bytes: int, count: Callable[[int], None] = lambda nbytes: None
) -> dict[str, Any]:
    """The request's JSON object; no more than ``max_bytes`` are ever held. ``count`` is told of them, see `bounded`."""
    media_type = media_type_of(request)
    if media_type not in ("application/json", ""):
        raise unsupported_media_type(media_type, "JSON with the header Content-Type: application/json")
    body = b"".join([chunk async for chunk in bounded(request, max_bytes, count)])
    try:
        # json.loads guesses UTF-16 and UTF-32 for bytes; JSON over HTTP is UTF-8, with Windows' mark before it or not.
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(f"the body is not valid JSON: {reason[:200]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequestError('the body must be a JSON object, {"prompt": …}', code="invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse(body: dict[str, Any], schema: type[Body], resolve: Callable[[Body], object]) -> Body:
    """``body`` as a ``schema``.

    Args:
        resolve: raises an `InvalidRequestError` for what the schema takes and the server does not; it is asked before
            another name is offered for an unknown one.

    Raises:
        InvalidRequestError: with the first bad field as ``param`` and every bad field in the message.
    """
    if body.get("cfg_scale") is not None and body.get("true_cfg_scale") is not None:
        raise InvalidRequestError(
            "cfg_scale and true_cfg_scale are two names of one setting; give one", param="cfg_scale"
        )
    # A null counts as absent; for the two names of one field it must not hide the other.
    body = {
        name: value for name, value in body.items() if not (name in ("cfg_scale", "true_cfg_scale") and value is None)
    }
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        details = _details(error)

    def refusal(fields: dict[str, Any]) -> str | None:
        try:
            resolve(schema.model_validate({"prompt": "a", "stream": body.get("stream") is True, **fields}))
        except ValidationError as error:
            return _explain(_details(error)[0])
        except ServiceError as error:
            return error.message
        return None

    raise _refused(
        details,
        lambda detail: (
            explain_unknown(tuple(map(str, detail["loc"])), body, schema, refusal)
            if detail["type"] == "extra_forbidden"
            else _explain(detail)
        ),
    )


def parse_plain(body: dict[str, Any], schema: type[Plain]) -> Plain:
    """``body`` as a ``schema`` of few fields; an unknown one is refused with the nearest valid name.

    Raises:
        InvalidRequestError: as `parse` does.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _refused(
            _details(error),
            lambda detail: (
                unknown_name("field", str(detail["loc"][-1]), schema.model_fields)
                if detail["type"] == "extra_forbidden"
                else _explain(detail)
            ),
        ) from None


def _details(error: ValidationError) -> list[Any]:
    return list(error.errors(include_url=False, include_context=False))


def _refused(details: list[Any], explain: Callable[[Any], str]) -> InvalidRequestError:
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    return InvalidRequestError(
        "; ".join(map(explain, details[:5])),
        param=_param(details[0]["loc"]),
        code=codes.get(details[0]["type"], "invalid_value"),
    )


def _param(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:80] for part in loc)


def _explain(detail: Any) -> str:
    """One validation error in a sentence: field, what is wrong, what came instead."""
    name = _param(detail["loc"])
    if detail["type"] == "missing":
        return f"{name}: this field is required"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    reason = f" ({REASONS[name]})" if name in REASONS else ""
    return f"{name}: {message}, not {_shown(detail['input'])}{reason}"


def _shown(value: Any) -> str:
    """A value as the client wrote it, short; a huge number has no short form."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "so large a number"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"
