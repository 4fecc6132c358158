"""Which numbers of computed steps are tried, on scales of quality that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.control.preset_budgets import next_budget
from magcache_core import Trial

STEPS = 28
POSSIBLE = range(4, STEPS)


def trial(computed: int, decibels: float) -> Trial:
    return Trial("C" * computed + "." * (STEPS - computed), "linear", 10 ** (-decibels / 20))


def tried(floors: list[float], psnr: Callable[[int], float], known: list[int]) -> tuple[list[int], list[Trial]]:
    """What is tried beyond ``known`` until all is known."""
    trials = [trial(budget, psnr(budget)) for budget in known]
    order = []
    while (budget := next_budget(floors, trials, POSSIBLE)) is not None:
        order.append(budget)
        assert budget in POSSIBLE
        assert budget not in {one.computed for one in trials}
        trials.append(trial(budget, psnr(budget)))
    return order, trials


@given(
    needed=st.lists(st.integers(4, STEPS), min_size=1, max_size=3),
    known=st.lists(st.sampled_from(POSSIBLE), unique=True, max_size=5),
)
def test_it_finds_the_fewest_of_each_floor_in_few_tries(needed: list[int], known: list[int]) -> None:
    floors = [float(2 * count) - 0.5 for count in needed]  # 2 dB a step
    order, trials = tried(floors, lambda computed: 2.0 * computed, known)
    for count in needed:
        assert count == STEPS or count in {one.computed for one in trials}, "it is known to reach the floor"
        assert count - 1 not in POSSIBLE or count - 1 in {one.computed for one in trials}, "and one less not to"
    assert len(order) <= 5 * len(needed)


@pytest.mark.parametrize(
    ("floors", "known", "expected"),
    [
        ([], [(10, 31.0)], None),
        ([30.0], [], 15),
        ([30.0], [(10, 31.0)], 6),
        ([30.0], [(10, 29.0)], 19),
        ([30.0], [(10, 31.0), (9, 29.0)], None),
        ([30.0, 40.0], [(10, 31.0), (9, 29.0)], 19),
        ([30.0], [(4, 31.0)], None),
        ([99.0], [(27, 60.0)], None),
    ],
)
def test_what_comes_next(floors: list[float], known: list[tuple[int, float]], expected: int | None) -> None:
    trials = [trial(*one) for one in known]
    assert next_budget(floors, trials, POSSIBLE) == expected
