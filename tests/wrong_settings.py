"""What every refused setting has in common."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.settings import Settings


def assert_refused(values: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    """``values`` are refused with one error, at ``place`` and with ``words``."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert words in error["msg"]
