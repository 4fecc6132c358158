"""How long tests wait for what should come: such limits end what hangs, and a slow machine must not meet them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

ANSWER_S = 400.0
"""A client's patience with a service, which may start parts anew before it answers."""


def wait_for(what: Callable[[], bool], then: str, seconds: float = 300.0) -> None:
    """Wait until ``what`` holds, and fail with what should have come when it does not."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            pytest.fail(f"not in {seconds:g} s: {then}")
        time.sleep(0.02)
