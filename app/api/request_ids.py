"""The id of a request, which its reply and every log line of it carry."""

from __future__ import annotations

import re
import uuid

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def sane_request_id(given: str | None) -> str:
    """The client's id when it is safe to log and to send back, else a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex
