"""A plan's schedule and weights are checked."""

from __future__ import annotations

import pytest

from magcache_core import ConfigError, Plan


def test_a_schedule_begins_with_a_computed_step_and_has_weights_for_each() -> None:
    for wrong in ("", ".C", "CX"):
        with pytest.raises(ConfigError, match="schedule"):
            Plan(wrong)
    with pytest.raises(ConfigError, match="weights"):
        Plan("CC.", "fitted", weights=((), ()))
