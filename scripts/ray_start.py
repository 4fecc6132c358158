"""``ray.init`` on a machine that may be busy."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import ray

from scripts.serve_process import LATE, TRIES


def start_ray(**options: Any) -> None:
    """Start a Ray of this process's own with the ``options`` of `ray.init`, again where it was too slow for Ray."""
    for left in reversed(range(TRIES)):
        known = set(psutil.Process().children())
        try:
            ray.init("local", **options)
            return
        except Exception as error:
            if not left or LATE not in str(error):
                raise
            for half_started in set(psutil.Process().children()) - known:
                with contextlib.suppress(psutil.NoSuchProcess):
                    half_started.kill()
