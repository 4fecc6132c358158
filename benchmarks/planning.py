"""How long a plan takes to find: ``python -m benchmarks.planning``.

A request is planned at its admission, so this is part of its latency. The peer is the threshold rule's schedule for as
many steps, which the same request would follow without a planner.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from magcache_core import load_profile, plan, schedule

STEPS, REPEATS = 100, 50
PROFILES = ("flux.1-dev", "flux-tiny")
ASKED: tuple[dict[str, float], ...] = ({"budget": 30}, {"budget": 50}, {"budget": 80}, {"max_error": 0.5})


def least_ms(call: Callable[[], object]) -> float:
    """The least of several runs, because other processes share the processor."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planning.json"))
    args = parser.parse_args()
    lines = []
    for name in PROFILES:
        profile = load_profile(name)
        config = profile.config(STEPS)
        rule = least_ms(lambda config=config: schedule(config))
        for asked in ASKED:
            milliseconds = least_ms(lambda profile=profile, asked=asked: plan(profile, STEPS, **asked))  # type: ignore[arg-type]
            lines.append(
                {
                    "profile": name,
                    **asked,
                    "plan_ms": round(milliseconds, 3),
                    "over_rule": round(milliseconds / rule, 2),
                }
            )
            print(json.dumps(lines[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"steps": STEPS, "repeats": REPEATS, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
