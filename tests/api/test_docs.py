"""docs/api.md names every field, event, error code and header that there is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import httpx

from app.api.calibration_status import CalibrationEvent, CalibrationReply
from app.api.calibrations import CalibrationRequest
from app.api.events import STREAM_EVENTS
from app.api.schemas import (
    CancelReply,
    ImageReply,
    ImagesReply,
    ImagesRequest,
    MagCacheBody,
    MagCacheReply,
    Timings,
    Usage,
)
from tests.api.fake_backend import FakeBackend

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_fields() -> None:
    for name in [
        *ImagesRequest.model_fields,
        "cfg_scale",
        *MagCacheBody.model_fields,
        *CalibrationRequest.model_fields,
    ]:
        assert f"`{name}`" in TEXT, name
    for model in (ImagesReply, ImageReply, MagCacheReply, Timings, Usage, CancelReply, CalibrationReply):
        for name in model.model_fields:
            assert f'"{name}"' in TEXT, name


def test_events() -> None:
    for event in STREAM_EVENTS:
        kinds = get_args(event.model_fields["type"].annotation)
        for name in [*(kind for kind in kinds if not kind.startswith("image_edit")), *event.model_fields]:
            assert name == "type" or f"`{name}`" in TEXT, name
    for kind in get_args(CalibrationEvent.model_fields["type"].annotation):
        assert f"`{kind}`" in TEXT, kind


def test_codes() -> None:
    for source in (Path(__file__).parents[2] / "app" / "api").glob("*.py"):
        for line in source.read_text(encoding="utf-8").splitlines():
            if 'code="' in line or line.strip().startswith('code = "'):
                code = line.split('"')[1] if "code = " in line else line.split('code="')[1].split('"')[0]
                assert f"`{code}`" in TEXT, code


async def test_headers_of_a_bare_file(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"prompt": "a", "response_format": "file", "negative_prompt": "b", "output_compression": 3}
    response = await client.post("/v1/images/generations", json=body)
    ours = [name for name in response.headers if name.startswith(("x-", "server-"))]
    assert len(ours) == 15
    for name in [*ours, "x-magcache-lowered-by", "x-soonest-seconds"]:
        assert f"`{name}`" in TEXT.lower(), name
