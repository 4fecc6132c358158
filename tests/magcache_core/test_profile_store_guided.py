"""True CFG decides first which profile a request gets."""

from __future__ import annotations

from dataclasses import replace

from magcache_core import load_profile, pick_profile, was_measured_for

PLAIN = load_profile("flux-tiny")
TWO, FOUR = (replace(PLAIN, name=f"cfg-{scale:g}", true_cfg_scale=scale) for scale in (2.0, 4.0))
SHORT = replace(PLAIN, name="short", steps=12)


def picked(scale: float, steps: int = 28) -> str:
    return pick_profile("flux-tiny", steps, 128, 128, [PLAIN, TWO, FOUR, SHORT], 3.5, scale).name


def test_requests_with_true_cfg_get_a_profile_that_was_measured_with_it() -> None:
    assert [picked(scale) for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 9.0)] == [
        "flux-tiny", "cfg-2", "cfg-2", "cfg-4", "cfg-4", "cfg-4",
    ]  # fmt: skip
    assert (picked(1.0, 12), picked(2.0, 12)) == ("short", "cfg-2")
    assert pick_profile("flux-tiny", 28, 128, 128, [PLAIN, SHORT], 3.5, 4.0) == PLAIN


def test_a_profile_was_measured_for_about_its_true_cfg_only() -> None:
    at = "flux-tiny", 28, 128, 128, 3.5
    assert was_measured_for(TWO, *at, 2.2)
    assert not was_measured_for(TWO, *at, 3.0)
    assert not was_measured_for(TWO, *at)
    assert was_measured_for(PLAIN, *at)
    assert not was_measured_for(PLAIN, *at, 2.0)
