"""Each section refuses values that contradict each other, and names that it does not have."""

from __future__ import annotations

from typing import Any

import pytest

from app.setting_sections import unknown_name
from tests.wrong_settings import assert_refused


@pytest.mark.parametrize(
    ("values", "place", "words"),
    [
        ({"magcache": {"threshold": 1}}, ("magcache",), "did you mean 'mag_threshold'?"),
        ({"sampling": {"width": 1}}, ("sampling",), "did you mean 'default_width'?"),
        ({"http": {"zzz": 1}}, ("http",), "valid names: allow_proxy_headers, api_keys_file, cors_origins"),
        (
            {"http": {"cors_origins": ["https://a.example/"]}},
            ("http", "cors_origins"),
            "'https://a.example/'; write '*'",
        ),
        ({"quality": {"low": 0.5}}, ("quality",), "low, medium and high are 0.5, 0.4, 0.65"),
        (
            {"quality_guard": {"min_computed_share": 0.8}},
            ("quality_guard",),
            "min_computed_share is 0.8; it must not exceed max_computed_share, 0.75",
        ),
        ({"quality": {"low_floor_db": 35.0}}, ("quality",), "low, medium and high are 35, 32, 38 dB"),
        ({"quality": {"high": 0.0}}, ("quality", "high"), "greater than 0"),
        ({"magcache": {"mag_retention_ratio": 2.0}}, ("magcache", "mag_retention_ratio"), "less than or equal to 1"),
        ({"sampling": {"default_width": 130}}, ("sampling",), "default_width is 130; it must be a multiple of 16"),
        ({"sampling": {"max_side": 250}}, ("sampling",), "max_side is 250"),
        ({"sampling": {"side_multiple": 8}}, ("sampling", "side_multiple"), "multiple of 16"),
        ({"sampling": {"side_multiple": 48}}, ("sampling",), "multiple of 48, for example 48"),
        ({"sampling": {"min_side": 512}}, ("sampling",), "must not exceed max_side, 256"),
        ({"sampling": {"max_pixels": 1024}}, ("sampling",), "raise it to at least min_side squared, 4096"),
        ({"sampling": {"default_width": 512}}, ("sampling",), "between min_side, 64, and max_side, 256"),
        ({"sampling": {"max_pixels": 8192}}, ("sampling",), "16384 pixels; raise max_pixels, 8192"),
        ({"elastic": {"start_wait_s": 30.0}}, ("elastic",), "full_wait_s is 20; raise it above start_wait_s, 30"),
        ({"sampling": {"num_inference_steps": 200}}, ("sampling",), "must not exceed max_inference_steps, 100"),
    ],
)
def test_a_wrong_setting_of_a_section_is_named(values: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    assert_refused(values, place, words)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert unknown_name("field", "sede", ["seed", "size"]) == "unknown field 'sede'; did you mean 'seed'?"
    assert unknown_name("field", "q", ["seed", "size"]) == "unknown field 'q'; valid names: seed, size"
