"""Retry-After under overload: clients that come again just then are admitted, and it is about when places are free."""

from __future__ import annotations

import heapq
import random
import statistics
from bisect import bisect
from dataclasses import dataclass, field, replace

import pytest

from app.control.promises import KEPT_S, Promises
from app.errors import BusyError
from app.settings import ElasticSettings, MagCacheSettings, Settings
from tests.control.simulated_ranks import SimulatedRanks
from tests.local_group import job

SETTINGS = Settings(
    max_batch_rows=4, max_waiting_pictures=32, magcache=MagCacheSettings(profile="flux-tiny"), patience_s=600.0
)


@dataclass
class Crowd:
    """Clients that come at random times, each with a request of its own, and again when they are told to."""

    ranks: SimulatedRanks
    returns: float = 1.0
    pressures: list[float] = field(default_factory=list)  # at each refusal
    admitted_again: int = 0
    refused_again: int = 0
    told_s: list[tuple[float, float]] = field(default_factory=list)
    joined_s: list[float] = field(default_factory=list)
    _draw: random.Random = field(default_factory=lambda: random.Random(0))
    _coming: list[tuple[float, int, bool]] = field(default_factory=list)
    _clients: int = 0

    def arrive(self, rate: float, seconds: float) -> None:
        """Newcomers at ``rate`` a second for so long, and all that they lead to meanwhile."""
        until = at = self.ranks.now_s
        until += seconds
        while (at := at + self._draw.expovariate(rate)) < until:
            self._clients += 1
            heapq.heappush(self._coming, (at, self._clients, False))
        while self._coming and self._coming[0][0] < until:
            at, client, again = heapq.heappop(self._coming)
            self._run_until(at)
            self._ask(client, again)
        self._run_until(until)

    def surge(self, clients: int) -> None:
        """So many at once, who are refused and never come again."""
        for _ in range(clients):
            self._clients += 1
            self._ask(self._clients, again=False, returns=False)

    def _ask(self, client: int, again: bool, returns: bool = True) -> None:
        now = self.ranks.now_s
        asked = job(f"{client}/{now}", steps=8)
        try:
            self.ranks.submit(replace(asked, retry_key=str(client)))
        except BusyError as busy:
            self.refused_again += again
            self.pressures.append(self.ranks.admission._pressure(0.0))
            if again or not returns:
                return
            self.told_s.append((now, busy.retry_after_s))
            if self._draw.random() < self.returns:
                heapq.heappush(self._coming, (now + busy.retry_after_s, client, True))
        else:
            self.admitted_again += again

    def _run_until(self, at: float) -> None:
        while self.ranks.now_s < at:
            before = self.ranks.admission.counts.admitted
            worked = self.ranks.tick()
            self.joined_s += [self.ranks.now_s] * (self.ranks.admission.counts.admitted - before)
            if not worked:
                self.ranks.now_s = at

    def errors(self) -> list[float]:
        """How far what each client was told is from when the place came that those ahead of it left, relatively."""
        found = []
        for now_s, wait_s in self.told_s:
            ahead = sum(asked < now_s <= asked + wait < now_s + wait_s for asked, wait in self.told_s)
            place = bisect(self.joined_s, now_s) + ahead
            if place < len(self.joined_s):
                place_s = self.joined_s[place] - now_s
                found.append(abs(wait_s - place_s) / place_s)
        return found

    @property
    def admitted_share(self) -> float:
        return self.admitted_again / (self.admitted_again + self.refused_again)


def capacity() -> float:
    """Images a second of a full batch."""
    ranks = SimulatedRanks(SETTINGS)
    for number in range(32):
        ranks.submit(job(f"{number}/0", steps=8))
    ranks.run()
    return 32 / ranks.now_s


CAPACITY = capacity()


@pytest.mark.parametrize("surge", [False, True])
@pytest.mark.parametrize("overload", [2.0, 10.0])
def test_clients_that_come_again_when_told_are_admitted(overload: float, surge: bool) -> None:
    crowd = Crowd(SimulatedRanks(SETTINGS))
    if surge:
        crowd.surge(2000)
        crowd.arrive(0.1, 1.2 * 2000 / CAPACITY + KEPT_S)  # until the last of them would have come
    begun_s, before = crowd.ranks.now_s, len(crowd.joined_s)
    crowd.arrive(overload * CAPACITY, 12.0)
    assert len(crowd.joined_s) - before >= 0.9 * CAPACITY * (crowd.ranks.now_s - begun_s)
    assert crowd.admitted_again + crowd.refused_again > 50
    assert crowd.admitted_share >= 0.9
    assert statistics.median(crowd.errors()) <= 0.25
    assert crowd.told_s[0][1] < 10 / CAPACITY, "the first one is told of the next place"


def test_places_kept_for_clients_who_never_come_slow_nothing_down() -> None:
    crowd = Crowd(SimulatedRanks(SETTINGS), returns=0.0)
    crowd.arrive(2 * CAPACITY, 20.0)
    begun_s, before = crowd.ranks.now_s, len(crowd.joined_s)
    crowd.arrive(2 * CAPACITY, 10.0)
    assert len(crowd.joined_s) - before >= 0.9 * CAPACITY * (crowd.ranks.now_s - begun_s)
    assert max(wait_s for now_s, wait_s in crowd.told_s if now_s > begun_s) < 10 / CAPACITY


@pytest.mark.parametrize("surge", [0, 200])
def test_with_elastic_on_none_is_refused_while_quality_could_still_fall(surge: int) -> None:
    """Also while places in the queue are free and kept for those who were refused before."""
    crowd = Crowd(SimulatedRanks(SETTINGS.model_copy(update={"elastic": ElasticSettings(enabled=True)})))
    crowd.surge(surge)
    crowd.arrive(3 * CAPACITY, 4.0)
    assert crowd.refused_again + len(crowd.told_s) > 20
    assert set(crowd.pressures) == {1.0}


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_promise_is_the_clients_own_and_of_its_time() -> None:
    clock = Clock()
    promises = Promises(clock)
    promises.make("a", 1.0)
    assert not promises.is_due("a")
    assert (promises.expected, promises.expected_within(0.5), promises.expected_within(1.5)) == (1.0, 0.0, 1.0)
    clock.now_s = 1.0
    promises.take("b")
    assert (promises.is_due("b"), promises.is_due("a"), promises.expected) == (False, True, 1.0)
    promises.take("a")
    assert (promises.is_due("a"), promises.expected) == (False, 0.0)
    promises.make("a", 1.0)
    clock.now_s = 2.1 + KEPT_S
    assert (promises.is_due("a"), promises.expected) == (False, 0.0)


def test_refusals_without_end_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.control.promises.MOST", 3)
    promises = Promises(Clock())
    for number in range(5):
        promises.make(str(number), 1.0)
    assert promises.expected == 3


def test_a_look_ahead_redeems_no_promise() -> None:
    """`AdmissionController.check` comes before `submit`, for requests with large bodies."""
    crowd = Crowd(SimulatedRanks(SETTINGS))
    crowd.arrive(2 * CAPACITY, 5.0)
    asked = replace(job("a/0", steps=8), retry_key="a")
    with pytest.raises(BusyError) as busy:
        crowd.ranks.submit(asked)
    crowd.ranks.now_s += busy.value.retry_after_s  # and no place is free
    crowd.ranks.admission.check(asked)
    crowd.ranks.submit(asked)
    with pytest.raises(BusyError):
        crowd.ranks.submit(replace(asked, row_id="b/0"))
