"""Which request a repetition repeats. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

from app.messages.repetitions import Reservation

LIMIT = 10_000
"""Requests that are remembered; the one that was not repeated for longest is forgotten first."""


class Reservations:
    """The first request of each scope, for ``keep_s`` after it was asked for last."""

    def __init__(self, keep_s: float, clock: Callable[[], float]) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Reservation]] = OrderedDict()  # the last use, in its order

    def reserve(self, scope: str, offered: Reservation, in_use: Container[str]) -> Reservation:
        """The request that has ``scope``, which is the ``offered`` one where there is none.

        Args:
            in_use: tokens of requests whose images are still there, and which stay known.
        """
        now = self._clock()
        self._forget(now, in_use)
        _, known = self._known.pop(scope, (now, offered))
        self._known[scope] = now, known
        if len(self._known) > LIMIT:
            self._known.popitem(last=False)
        return known

    def _forget(self, now: float, in_use: Container[str]) -> None:
        late = []
        for scope, (used_s, known) in self._known.items():
            if used_s + self._keep_s > now:
                break
            if known.token not in in_use:
                late.append(scope)
        for scope in late:
            del self._known[scope]
