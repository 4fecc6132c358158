"""What MagCache saves while denoising, against what it leaves out, and what the control plane costs a step."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.serve.load import workload
from benchmarks.serve.systems import ask, metric

STEPS = 28
SIZE = 128


def speed_up(url: str, repetitions: int) -> dict[str, Any]:
    """Denoising seconds of the same images with every step computed and with the cache, taken in turns.

    ``ratio`` is the measured speed-up as a share of total / computed steps: 1 when a reused step and the control plane
    cost nothing.
    """
    wishes = [replace(wish, width=SIZE, height=SIZE, steps=STEPS) for wish in workload(repetitions + 1, seed=3)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    gaps, steps, computed = 0.0, 0.0, 0
    for wish in wishes:
        for enabled in (False, True):
            before = _gap(url)
            image = ask(url, wish, magcache={"enabled": enabled})
            seconds[enabled].append(image["timings"]["denoise_s"])
            if not enabled:
                after = _gap(url)
                gaps, steps = gaps + after[0] - before[0], steps + after[1] - before[1]
            else:
                computed = image["magcache"]["computed"]
    # The first of each warms caches and allocators up.
    full, cached = (statistics.median(seconds[enabled][1:]) for enabled in (False, True))
    return {
        "steps": STEPS,
        "computed": computed,
        "uncached_s": round(full, 5),
        "cached_s": round(cached, 5),
        "speed_up": round(full / cached, 3),
        "possible": round(STEPS / computed, 3),
        "ratio": round(full / cached / (STEPS / computed), 4),
        "computed_step_s": round(full / STEPS, 6),
        "gap_per_step_s": round(gaps / steps, 6) if steps else None,
        "gap_share": round(gaps / steps / (full / STEPS), 4) if steps else None,
    }


def _gap(url: str) -> tuple[float, float]:
    """Seconds that ranks with rows waited for plans so far, and the number of steps."""
    return metric(url, "flux_plan_wait_seconds_sum"), metric(url, "flux_plan_wait_seconds_count")
