"""What bodies of every type have in common: declared type, compression, and the limit on what is read of them."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus

from starlette.requests import Request

from app.errors import InvalidRequestError


def media_type_of(request: Request) -> str:
    """The declared type of the body, without its parameters; empty when the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported_media_type(declared: str, wanted: str) -> InvalidRequestError:
    """The error for a body of the type ``declared`` where it must be ``wanted``."""
    return InvalidRequestError(
        f"the body must be {wanted}, not {declared[:80]!r}",
        param="Content-Type",
        code="unsupported_media_type",
        status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    )


async def bounded(
    request: Request, max_bytes: int, count: Callable[[int], None] = lambda nbytes: None
) -> AsyncGenerator[bytes, None]:
    """The body's chunks, inflated; a body that turns out larger than ``max_bytes``, inflated or not, is refused.

    Args:
        count: told of the bytes of each chunk; may raise to end the reading.
    """
    encoding = _encoding(request)
    inflater = Inflater(encoding) if encoding else None
    sent = read = 0
    async for chunk in request.stream():
        sent += len(chunk)
        try:
            content = inflater.inflate(chunk, max_bytes - read) if inflater else chunk
        except zlib.error as error:
            raise _damaged(encoding) from error
        read += len(content)
        if max(sent, read) > max_bytes:
            raise InvalidRequestError(f"the body is larger than {max_bytes} bytes", code="body_too_large", status=413)
        count(len(content))
        yield content
    if inflater and not inflater.complete:
        raise _damaged(encoding)


class Inflater:
    """Inflates a body that comes in chunks, never further than allowed."""

    def __init__(self, encoding: str) -> None:
        """``encoding`` is `gzip` or `deflate`, which means zlib's format or, from some clients, a bare one."""
        self._gzip = encoding == "gzip"
        self._stream = zlib.decompressobj(31) if self._gzip else None

    @property
    def complete(self) -> bool:
        """Whether the end was reached."""
        return self._stream is not None and self._stream.eof

    def inflate(self, data: bytes, room: int) -> bytes:
        """The content of ``data``; if it is more than ``room`` bytes, one byte more than that and no further.

        Raises:
            zlib.error: the data are damaged, or go on after their end.
        """
        content = bytearray()
        while data and len(content) <= room:
            if self._stream is None:
                self._stream = zlib.decompressobj(15 if data[0] & 0x8F == 0x08 else -15)
            elif self._stream.eof:
                if not self._gzip:
                    raise zlib.error("data after the end")
                self._stream = zlib.decompressobj(31)  # gzip files may be joined
            content += self._stream.decompress(data, room - len(content) + 1)
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
        return bytes(content)


def _encoding(request: Request) -> str:
    """The compression of the body, empty for none."""
    declared = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    encodings = [name.strip().removeprefix("x-") for name in declared if name.strip() not in ("", "identity")]
    if not encodings or encodings in (["gzip"], ["deflate"]):
        return "".join(encodings)
    raise InvalidRequestError(
        f"Content-Encoding {', '.join(encodings)[:80]!r} is not read here; send gzip, deflate or none",
        param="Content-Encoding",
        code="unsupported_encoding",
        status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        headers={"Accept-Encoding": "gzip, deflate"},
    )


def _damaged(encoding: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the body is not valid {encoding}, as Content-Encoding says", param="Content-Encoding", code="invalid_encoding"
    )
