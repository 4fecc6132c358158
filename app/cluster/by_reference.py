"""Large values travel by reference: processes that only pass them on never open them."""

from typing import Any

import ray

INLINE_BYTES = 100_000
"""Up to this size Ray carries a value within a call; a reference would take another round to resolve."""


def by_reference(value: Any) -> Any:
    """A reference to ``value``, or the value itself when its ``nbytes`` are few."""
    return value if value.nbytes <= INLINE_BYTES else ray.put(value)
