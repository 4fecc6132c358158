"""How far a calibration is: as a reply, and as the events of a stream that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Literal

from pydantic import BaseModel, Field

from app.api.events import sse_event
from app.messages.calibration import CalibrationStatus

LOOK_S = 1.0
"""Time between two looks at a calibration that is followed; it may be in another process."""


class CalibrationReply(BaseModel):
    """How far a calibration is."""

    id: str
    object: Literal["calibration"] = "calibration"
    status: Literal["running", "done", "cancelled", "failed"]
    phase: Literal["record", "probe", "try"] = Field(description="What it runs now, or ran last.")
    progress: float = Field(description="Share of its runs that are done, 0 to 1; about, until it is done.")
    runs: int = Field(description="Images that it has run, those before an interruption included.")
    expected_runs: int = Field(description="About how many it will have run at its end.")
    seconds: float = Field(description="Time of these runs, waits for clients' images included.")
    profile: str | None = Field(description="`NAME@VERSION` once it is done.")
    message: str | None = Field(description="What made it fail.")


class CalibrationEvent(CalibrationReply):
    """A change of it; the last one has another status than `running`."""

    type: Literal["calibration.running", "calibration.done", "calibration.cancelled", "calibration.failed"]


def reply_of(status: CalibrationStatus) -> CalibrationReply:
    """``status`` as a reply."""
    return CalibrationReply.model_validate(_fields(status))


def event_of(status: CalibrationStatus) -> bytes:
    """``status`` as a server-sent event."""
    return sse_event(CalibrationEvent.model_validate({**_fields(status), "type": f"calibration.{status.state}"}))


async def follow(look: Callable[[], Awaitable[CalibrationStatus]]) -> AsyncGenerator[CalibrationStatus, None]:
    """What ``look`` finds, each time that it has changed, until the calibration has ended."""
    before: CalibrationStatus | None = None
    while before is None or before.state == "running":
        if before is not None:
            await asyncio.sleep(LOOK_S)
        status = await look()
        if status != before:
            yield status
        before = status


def _fields(status: CalibrationStatus) -> dict[str, object]:
    return {**vars(status), "status": status.state, "progress": round(status.progress, 4)}
