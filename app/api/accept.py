"""What an Accept header asks for."""

from __future__ import annotations

import re


def media_types(accept: str) -> list[str]:
    """The types and ranges (``image/*``) of an Accept header, best first; those of weight 0 are left out."""
    ranges: list[tuple[float, str]] = []
    for part in accept.lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        weight = float(quality) if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality) else 0.0
        if weight > 0:
            ranges.append((weight, media_type))
    ranges.sort(key=lambda entry: -entry[0])  # stable: the client's order stands among equals
    return [media_type for _, media_type in ranges]


def prefers_html(accept: str) -> bool:
    """Whether an Accept header is a browser's that opens a page: it names HTML, and JSON no sooner."""
    return next((one for one in media_types(accept) if one in ("text/html", "application/json")), "") == "text/html"
