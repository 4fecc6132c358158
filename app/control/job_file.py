"""The job of the calibration under way as a file's content: a service that was interrupted goes on with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from app.messages.calibration import CalibrationJob


def to_bytes(job: CalibrationJob) -> bytes:
    """``job`` as JSON."""
    return json.dumps(asdict(job)).encode()


def from_bytes(content: bytes) -> CalibrationJob | None:
    """What `to_bytes` wrote, if it is whole and of this version."""
    try:
        kept: dict[str, Any] = json.loads(content)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
        }
        return CalibrationJob(**fields)
    except (ValueError, TypeError, AttributeError):
        return None
