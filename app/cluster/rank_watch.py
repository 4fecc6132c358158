"""Whether all ranks of a group answered lately."""

import asyncio
import time
from collections.abc import Sequence

from ray.actor import ActorHandle

FRESH_S = 10.0
"""How long an answer of all ranks counts; the replica has them asked several times within it."""


class RankWatch:
    """Asks the ranks to answer, and remembers when all of them did."""

    def __init__(self, ranks: Sequence[ActorHandle]) -> None:
        self._ranks = ranks
        self._under_way = 0
        self._answered_s = -float("inf")

    async def check(self) -> None:
        """Return when every rank has done what was sent to it before; raises Ray's error when one is dead."""
        self._under_way += 1
        try:
            await asyncio.gather(*(rank.ping.remote() for rank in self._ranks))
        except BaseException:
            self._answered_s = -float("inf")
            raise
        else:
            self._answered_s = time.monotonic()
        finally:
            self._under_way -= 1

    @property
    def is_fresh(self) -> bool:
        """Whether all ranks answered lately, or are being asked: a rank in a long step is late and not dead."""
        return self._under_way > 0 or time.monotonic() - self._answered_s <= FRESH_S
