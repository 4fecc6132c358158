"""What an Accept header asks for."""

from __future__ import annotations

import pytest

from app.api.accept import media_types, prefers_html

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/png;q=0.5, Image/WebP, */*;q=0.1", ["image/webp", "image/png", "*/*"]),
        ("image/png;q=0, image/jpeg", ["image/jpeg"]),
        ("image/png;q=x, image/jpeg", ["image/jpeg"]),
    ],
)
def test_types_come_by_weight_and_then_in_the_clients_order(accept: str, expected: list[str]) -> None:
    assert media_types(accept) == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (CHROMIUM, True),
        ("text/html", True),
        ("text/html, application/json;q=0.9", True),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_a_browser_is_known_by_its_wish_for_html(accept: str, expected: bool) -> None:
    assert prefers_html(accept) == expected
