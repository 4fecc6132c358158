"""Which request a repetition repeats, and for how long that is known."""

from __future__ import annotations

import pytest

from app.control import reservations as module
from app.control.reservations import Reservations
from app.messages.repetitions import Reservation


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(token: str) -> Reservation:
    return Reservation(token, "body", 7, 0.0)


def test_the_first_of_a_scope_is_the_one() -> None:
    known = Reservations(10, Clock())
    assert known.reserve("a", request("1"), ()).token == "1"
    assert known.reserve("a", request("2"), ()).token == "1"
    assert known.reserve("b", request("3"), ()).token == "3"


def test_it_is_known_for_a_time_after_its_last_use() -> None:
    clock = Clock()
    known = Reservations(10, clock)
    known.reserve("a", request("1"), ())
    known.reserve("b", request("2"), ())
    for clock.now in (9.0, 18.0):
        assert known.reserve("a", request("3"), ()).token == "1"
    assert known.reserve("b", request("4"), ()).token == "4", "not used for longer than that"


def test_a_request_under_way_stays_known() -> None:
    clock = Clock()
    known = Reservations(10, clock)
    known.reserve("a", request("1"), ())
    clock.now = 1000
    assert known.reserve("a", request("2"), {"1"}).token == "1"


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 3)
    known = Reservations(10, Clock())
    for scope in "abc":
        known.reserve(scope, request(scope), ())
    known.reserve("a", request("again"), ())
    known.reserve("d", request("d"), ())
    assert known.reserve("a", request("new"), ()).token == "a"
    assert known.reserve("b", request("new"), ()).token == "new", "the one that was not repeated for longest"
