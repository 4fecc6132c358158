"""What a test does where something that it needs is not there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip on a person's machine, where the other tests are worth having; fail where commits are judged."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and in CI nothing is left out")
    pytest.skip(reason)
