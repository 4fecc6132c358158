"""Which refused clients were told to come again, and when: places are kept for as many as usually come. Pure."""

from collections.abc import Callable

from sortedcontainers import SortedList

KEPT_S = 2.0
"""How long after its time a promise is kept: whole seconds of ``Retry-After`` and the way take that long."""
MOST = 10_000
"""Bounds the memory that refused clients take."""
_NEWEST_SHARE = 0.05


class Promises:
    """The times at which refused clients may ask again; a client is known by a key that its repetition has as well."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: SortedList[tuple[float, str]] = SortedList()
        self._kept_share = 1.0  # running mean: how many come when they may

    @property
    def expected(self) -> float:
        """How many of the refused clients will come."""
        self._forget_late()
        return self._kept_share * len(self._open)

    def expected_within(self, seconds: float) -> float:
        """How many of them come before ``seconds`` have passed."""
        self._forget_late()
        return self._kept_share * self._open.bisect_right((self._clock() + seconds, ""))

    def make(self, key: str, wait_s: float) -> None:
        """Promise a place ``wait_s`` seconds from now; beyond `MOST` open promises none is noted."""
        if len(self._open) < MOST:
            self._open.add((self._clock() + wait_s, key))

    def is_due(self, key: str) -> bool:
        """Whether there is a promise to ``key`` whose time has come."""
        return self._due(key) is not None

    def take(self, key: str) -> None:
        """Redeem a promise to ``key`` whose time has come, if there is one."""
        promise = self._due(key)
        if promise is not None:
            self._open.remove(promise)
            self._learn(True)

    def _due(self, key: str) -> tuple[float, str] | None:
        self._forget_late()
        come = self._open.irange((-float("inf"), ""), (self._clock(), key))
        return next((promise for promise in come if promise[1] == key), None)

    def _forget_late(self) -> None:
        now = self._clock()
        while self._open and self._open[0][0] + KEPT_S < now:
            self._open.pop(0)
            self._learn(False)
        if not self._open:
            self._kept_share = 1.0  # the next crowd is another one

    def _learn(self, kept: bool) -> None:
        self._kept_share += _NEWEST_SHARE * (kept - self._kept_share)
