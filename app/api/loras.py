"""`lora` in a request: which low-rank adapters its images are made with, and how strongly they act."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from app.api.schemas import LoraBody, LoraReply
from app.errors import InvalidRequestError
from app.messages.loras import LoraListing, LoraUse
from app.settings import Settings


def may_name_loras(fields: Mapping[str, Any], settings: Settings) -> bool:
    """Whether the request with ``fields``, misspelt ones among them, may ask for an adapter that there is."""
    return settings.loras is not None and any("lora" in name.lower() for name in fields)


def resolve_loras(asked: Sequence[LoraBody], listing: LoraListing, settings: Settings) -> tuple[LoraUse, ...]:
    """The adapters that a request names, with the content that their names have now.

    Raises:
        InvalidRequestError: there is no such adapter (404), or the request names too many, one twice, or too large a
            scale.
    """
    if not asked:
        return ()
    check_configured(settings, "lora")
    if len(asked) > settings.max_loras:
        raise InvalidRequestError(
            f"lora names {len(asked)} adapters; at most {settings.max_loras} are allowed on this server", param="lora"
        )
    uses = tuple(
        _resolve(index, one, {each.name for each in asked[:index]}, listing, settings)
        for index, one in enumerate(asked)
    )
    nbytes = sum(use.nbytes for use in uses)
    if nbytes > settings.loras_bytes:
        raise InvalidRequestError(
            f"lora names adapters that take {nbytes} bytes together, above the server's loras_bytes, "
            f"{settings.loras_bytes}; name fewer",
            param="lora",
        )
    return uses


def _resolve(index: int, asked: LoraBody, before: set[str], listing: LoraListing, settings: Settings) -> LoraUse:
    param, limit = f"lora.{index}", settings.max_lora_scale
    if asked.name in before:
        raise InvalidRequestError(f"{param}.name: {asked.name[:80]!r} is named twice", param=f"{param}.name")
    scale = 1.0 if asked.scale is None else asked.scale
    if abs(scale) > limit:
        raise InvalidRequestError(
            f"{param}.scale must be from {-limit:g} to {limit:g} on this server", param=f"{param}.scale"
        )
    found = listing.offered.get(asked.name)
    if found is None:
        reason = listing.refused.get(asked.name)
        raise InvalidRequestError(
            f"the adapter {asked.name[:80]!r} cannot be used: {reason}" if reason else _unknown(asked.name, listing),
            param=f"{param}.name",
            code="lora_not_found",
            status=HTTPStatus.NOT_FOUND,
        )
    return LoraUse(found.name, scale, found.digest, found.nbytes)


def _unknown(name: str, listing: LoraListing) -> str:
    nearest = difflib.get_close_matches(name, listing.offered, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]!r}?" if nearest else "GET /v1/loras lists those that there are"
    return f"unknown adapter {name[:80]!r}; {advice}"


def check_configured(settings: Settings, param: str | None) -> None:
    """Raise an `InvalidRequestError` where the operator named no folder of adapters."""
    if settings.loras is None:
        raise InvalidRequestError(
            "this service has no adapters; the operator names their folder in the setting loras",
            param=param,
            code="loras_not_configured",
        )


def lora_replies(loras: Sequence[LoraUse]) -> list[LoraReply]:
    """``loras`` as replies have them."""
    return [LoraReply(name=use.name, scale=use.scale, digest=use.digest) for use in loras]
