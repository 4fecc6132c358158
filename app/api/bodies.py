"""What bodies of every type have in common: their declared type is checked, and no more than allowed is ever read."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from http import HTTPStatus

from starlette.requests import Request

from app.errors import InvalidRequestError


def require_media_type(request: Request, media_type: str, wanted: str, *, undeclared: str = "") -> None:
    """Refuse a body of another type than ``media_type``.

    Args:
        wanted: what the error says that the body must be.
        undeclared: the type of a body whose request does not name one.
    """
    declared = request.headers.get("content-type", undeclared).partition(";")[0].strip().lower()
    if declared != media_type:
        raise InvalidRequestError(
            f"the body must be {wanted}, not {declared[:80]!r}",
            param="Content-Type",
            code="unsupported_media_type",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )


async def bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; a body that turns out larger than ``max_bytes`` is refused."""
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > max_bytes:
            raise InvalidRequestError(f"the body is larger than {max_bytes} bytes", code="body_too_large", status=413)
        yield chunk
