"""`/v1/loras`: which low-rank adapters requests may name, and their folder read again."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from app.api.access import check_operator
from app.api.loras import check_configured
from app.api.schemas import ErrorReply, LoraCard, LoraList, RefusedLora
from app.messages.loras import LoraListing

router = APIRouter()

_PATH = "/v1/loras"
_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorReply, "description": "The service wants an API key, and this one is missing or unknown."}
}
_FORBIDDEN: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The operator named no folder of adapters."},
    403: {"model": ErrorReply, "description": "The service has no API keys, and the request is from another machine."},
}


@router.get(_PATH, summary="List the adapters", tags=["models"], responses=_RESPONSES)
async def list_loras(request: Request) -> LoraList:
    """The low-rank adapters that `lora` may name; none where the operator named no folder."""
    return _list(await request.app.state.service.get_backend().loras())


@router.post(f"{_PATH}/reload", summary="Read the folder again", tags=["models"], responses=_RESPONSES | _FORBIDDEN)
async def reload(request: Request) -> LoraList:
    """Read the folder of adapters again, for all requests that come afterwards; images under way keep theirs."""
    service = request.app.state.service
    check_operator(request, service.settings.http, "reads its adapters again")
    check_configured(service.settings, None)
    return _list(await service.get_backend().reload_loras())


def _list(listing: LoraListing) -> LoraList:
    cards = [
        LoraCard(id=one.name, rank=one.rank, bytes=one.nbytes, digest=one.digest) for one in listing.offered.values()
    ]
    return LoraList(data=cards, refused=[RefusedLora(id=name, reason=why) for name, why in listing.refused.items()])
