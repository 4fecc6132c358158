"""What a request has in common with its repetition: a header that names both, or what OpenAI's clients count."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.requests import Request

from app.api.backend import RequestIdentity
from app.api.proxy_guard import WITHOUT_ID
from app.api.repeating import RETRY_COUNT
from app.errors import InvalidRequestError

HEADER = "idempotency-key"
"""draft-ietf-httpapi-idempotency-key-header; quotes around the key, as the draft has them, are a part of it here."""


def body_digest(fields: Mapping[str, Any], files: Iterable[bytes | str] = ()) -> str:
    """Equal for equal bodies, in whatever order the fields stand and whatever a form's boundary is."""
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16)
    for file in files:
        content = file if isinstance(file, bytes) else file.encode("utf-8", "surrogatepass")
        digest.update(hashlib.blake2b(content).digest())
    return digest.hexdigest()


def identity_of(request: Request, body: str, key_name: str) -> RequestIdentity:
    """The identity of a request whose body has the digest ``body``.

    Raises:
        InvalidRequestError: its Idempotency-Key is empty, too long or not printable ASCII.
    """
    key = request.headers.get(HEADER)
    if key is not None and re.fullmatch(r"[\x20-\x7e]{1,255}", key) is None:
        raise InvalidRequestError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters", param="Idempotency-Key"
        )
    given = None if WITHOUT_ID in request.headers else request.headers.get("x-request-id")
    named = ("key", key) if key is not None else ("id", given, body) if given == request.state.request_id else None
    count = request.headers.get(RETRY_COUNT, "")
    return RequestIdentity(
        scope="" if named is None else _digest(key_name, *named),
        body=_digest(key_name, body),
        keyed=key is not None,
        retried=count.isdecimal() and count.isascii() and int(count) > 0,
    )


def _digest(*parts: str | None) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
