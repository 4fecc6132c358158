"""One fault, or two within one recovery, under load: what was lost, what was wrong, and how long nothing came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.chaos.clients import Crowd, Outcome, Result
from benchmarks.chaos.faults import Fault, Served

Faults = tuple[Fault, ...]
"""One, or several within one recovery."""

SETTLED = 2
"""Right images that each kind of client must have after a fault before it counts as overcome."""
BEFORE_S = 1.0
BETWEEN_S = 2.0
"""Between two faults within one recovery."""
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Trial:
    """What became of a fault.

    Attributes:
        kind: see `kind_of`.
        lost: requests under way at the fault that ended without an image, by kind of client.
        refused: requests after it that did, likewise.
        wrong: images with other pixels than they should have.
        gap_s: the longest time in which no image came.
        by_hand: it did not heal by itself within `PATIENCE_S`.
        details: of requests without an image, each kind of answer once.
        through: what stood before the service, ``envoy`` or nothing.
    """

    fault: str
    kind: str
    lost: dict[str, int]
    refused: dict[str, int]
    wrong: int
    gap_s: float
    by_hand: bool
    details: list[str]
    through: str = ""


def kind_of(faults: Faults) -> str:
    """For the goals, and for ``--only``."""
    kinds = [fault.kind for fault in faults]
    return "pause" if "pause" in kinds else "twice" if len(kinds) > 1 else kinds[0]


def run(
    served: Served,
    url: str,
    faults: Faults,
    bodies: list[dict[str, Any]],
    expected: list[Any],
    watched_s: float = 0.0,
) -> Trial:
    """Have clients ask at ``url``, commit ``faults`` one after another, and wait until images come as before.

    Args:
        watched_s: how long afterwards images must still come, of a fault whose effect is late.
    """
    _wait(lambda: served.is_whole, PATIENCE_S)
    crowd = Crowd(url, bodies, expected)
    crowd.start()
    started = time.monotonic()
    _wait(lambda: min(crowd.right_since(started).values()) > 0, PATIENCE_S)
    time.sleep(BEFORE_S)
    crowd.fault_s = time.monotonic()
    for number, fault in enumerate(faults):
        if number:
            time.sleep(BETWEEN_S)
        fault.commit(served)
    time.sleep(watched_s)
    last = time.monotonic()
    healed = _wait(lambda: min(crowd.right_since(last).values()) >= SETTLED, PATIENCE_S)
    crowd.stop()
    return judge(", then ".join(map(str, faults)), kind_of(faults), crowd.outcomes, crowd.fault_s, by_hand=not healed)


def judge(fault: str, kind: str, outcomes: Sequence[Outcome], fault_s: float, by_hand: bool) -> Trial:
    """The figures of a trial from its requests."""

    def count(result: Result) -> dict[str, int]:
        kinds = sorted({one.client for one in outcomes})
        return {kind: sum(one.result is result and one.client == kind for one in outcomes) for kind in kinds}

    ends = sorted(one.ended_s for one in outcomes if one.result is Result.RIGHT)
    before = max((end for end in ends if end < fault_s), default=fault_s)
    moments = [before, *(end for end in ends if end >= fault_s)]
    gap = max((later - earlier for earlier, later in pairwise(moments)), default=float("inf"))
    return Trial(
        fault=fault,
        kind=kind,
        lost=count(Result.LOST),
        refused=count(Result.REFUSED),
        wrong=sum(one.result is Result.WRONG for one in outcomes),
        gap_s=round(gap, 1),
        by_hand=by_hand,
        details=sorted({one.detail for one in outcomes if one.detail})[:8],
    )


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
