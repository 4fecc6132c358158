"""Which numbers of computed steps are worth trying to learn the fewest that reach a quality. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from magcache_core import Trial
from magcache_core.expected import reached_db


def next_budget(floors_db: Sequence[float], trials: Sequence[Trial], possible: range) -> int | None:
    """The number of computed steps to try next, by bisection for one floor after another; None when all are known.

    Args:
        floors_db: mean PSNRs to reach.
        trials: by rising number of computed steps; more of them are taken to be no worse.
        possible: numbers of computed steps that can be tried; beyond them every step computes, which reaches any.
    """
    for floor in floors_db:
        enough = min((trial.computed for trial in trials if reached_db(trial) >= floor), default=possible.stop)
        short = [trial.computed for trial in trials if trial.computed < enough]
        too_few = max(short, default=possible.start - 1)
        if enough - too_few > 1:
            return (enough + too_few) // 2
    return None
