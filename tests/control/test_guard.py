"""The quality guard's decisions, on tables and on simulated traffic with noisy figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from app.control.guard import (
    ENOUGH_TO_ESTIMATE,
    MOST_KINDS,
    RETRY,
    QualityGuard,
    decide,
    exceeds,
    misses,
    worst_tenth,
)
from app.messages.jobs import ImageKind
from app.settings import QualityGuardSettings

KIND = ImageKind("flux.1-dev@0123456789ab", 28, guided=False)
TARGET = 38.0
HOUR = 180
"""Images compared in an hour, of one image a second with a share of 5 %."""


def figures(below: int, above: int) -> list[float]:
    return [TARGET - 1.0] * below + [TARGET + 1.0] * above


@pytest.mark.parametrize(
    ("below", "above", "too_many", "few"),
    [
        (0, 0, False, False),
        (1, 0, False, False),  # one of ten is
        (2, 0, True, False),
        (2, 2, False, False),
        (3, 3, True, False),
        (5, 15, True, False),
        (4, 16, False, False),
        (0, 21, False, False),
        (0, 22, False, True),
        (1, 36, False, False),
        (1, 37, False, True),
        (10, 90, False, False),
        (5, 95, False, True),
    ],
)
def test_a_count_of_misses_is_judged_by_how_likely_it_is(below: int, above: int, too_many: bool, few: bool) -> None:
    seen = figures(below, above)
    assert (misses(seen, TARGET), exceeds(seen, TARGET)) == (too_many, few)


HIGH, LOW = [60.0] * 30, [20.0] * 30


@pytest.mark.parametrize(
    ("seen", "bounds", "expected"),
    [
        ({10: LOW}, (7, 21), 11),
        ({10: HIGH}, (7, 21), 9),
        ({10: LOW}, (7, 10), 10),
        ({10: HIGH}, (10, 21), 10),
        ({10: HIGH, 9: LOW}, (7, 21), 10),  # a step less was too few
        ({10: HIGH, 9: HIGH}, (7, 21), 9),
        ({10: [TARGET + 2.0] * 100}, (7, 21), 10),  # within the margin
        ({10: [TARGET + 3.0] * 100}, (7, 21), 9),
    ],
)
def test_a_budget_moves_by_one_step_within_its_bounds(
    seen: dict[int, list[float]], bounds: tuple[int, int], expected: int
) -> None:
    assert decide(seen, 10, bounds, TARGET, 3.0) == expected


def test_the_estimate_is_as_often_above_as_below_the_true_percentile() -> None:
    rng = np.random.default_rng(0)
    true = -1.2815515655446004  # of the normal distribution
    for count in (10, 25, 100):
        estimates = [worst_tenth(list(rng.normal(size=count))) for _ in range(2000)]
        above = sum(estimate > true for estimate in estimates if estimate is not None) / 2000
        assert above == pytest.approx(0.5, abs=0.03), count
    assert worst_tenth([1.0] * (ENOUGH_TO_ESTIMATE - 1)) is None


class Traffic:
    """Images of one kind whose PSNR rises with the computed steps and scatters; the guard sees each of them."""

    def __init__(self, start: int, seed: int, scatter_db: float, settings: QualityGuardSettings | None = None) -> None:
        self.guard = QualityGuard(settings or QualityGuardSettings(target_psnr_db=TARGET), TARGET)
        self.budgets: list[int] = []
        self.figures: list[float] = []
        self.harder_db = 0.0
        self._start = start
        self._rng = np.random.default_rng(seed)
        self._scatter_db = scatter_db

    def mean_db(self, computed: int) -> float:
        return 30.0 + 40.0 * math.log10(computed / 4) - self.harder_db

    def best(self) -> int:
        """The fewest computed steps that hold the target."""
        return next(c for c in itertools.count(1) if self.mean_db(c) - 1.2816 * self._scatter_db >= TARGET)

    def run(self, images: int) -> None:
        for _ in range(images):
            computed = dict(self.guard.budgets).get(KIND, self._start)
            figure = float(self._rng.normal(self.mean_db(computed), self._scatter_db))
            self.budgets.append(computed)
            self.figures.append(figure)
            self.guard.observe(KIND, computed, figure)

    @property
    def changes(self) -> int:
        return sum(before != after for before, after in itertools.pairwise(self.budgets))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("scatter_db", "start"), [(4.0, 7), (4.0, 13), (8.0, 8), (8.0, 16)])
def test_an_hour_of_traffic_converges_from_both_sides_and_holds_the_target(
    scatter_db: float, start: int, seed: int
) -> None:
    traffic = Traffic(start, seed, scatter_db)
    traffic.run(HOUR)
    best = traffic.best()
    assert abs(traffic.budgets[-1] - best) <= (2 if start < best else 3)
    traffic.run(HOUR)
    later = np.array(traffic.figures[HOUR:])
    assert (later < TARGET).mean() <= 0.15, "a tenth, and what chance makes of it"
    # Towards the target, and at most two steps to and fro.
    assert traffic.changes <= abs(traffic.budgets[-1] - start) + 4


def test_it_does_not_oscillate_where_one_step_less_is_far_too_few() -> None:
    class Steep(Traffic):
        def mean_db(self, computed: int) -> float:
            return TARGET + 12.0 * (computed - 9.5)

    traffic = Steep(14, 0, 1.0)
    traffic.run(10 * RETRY)
    assert traffic.budgets[-1] == 10
    below = sum(budget == 9 for budget in traffic.budgets)
    assert below <= 3 * (10 + 1), "three images each time that it is tried again"


def test_it_follows_requests_that_become_harder_and_easier() -> None:
    traffic = Traffic(10, 1, 4.0)
    traffic.run(HOUR)
    traffic.harder_db = 6.0
    traffic.run(HOUR)
    assert abs(traffic.budgets[-1] - traffic.best()) <= 2
    traffic.harder_db = 0.0
    traffic.run(4 * HOUR)
    assert abs(traffic.budgets[-1] - traffic.best()) <= 2


def test_bounds_are_the_operators() -> None:
    settings = QualityGuardSettings(target_psnr_db=TARGET, min_computed_share=0.3, max_computed_share=0.4)
    hopeless = Traffic(10, 0, 1.0, settings)
    hopeless.harder_db = 30.0
    hopeless.run(HOUR)
    assert max(hopeless.budgets) == 11  # of 28
    easy = Traffic(10, 0, 1.0, settings)
    easy.harder_db = -30.0
    easy.run(HOUR)
    assert min(easy.budgets) == 9


def test_budgets_are_named_only_where_they_differ_and_kinds_are_bounded() -> None:
    guard = QualityGuard(QualityGuardSettings(target_psnr_db=TARGET), TARGET)
    assert guard.observe(KIND, 10, 20.0) is None
    assert guard.budgets == ()
    change = guard.observe(KIND, 10, 20.0)
    assert change is not None
    assert (change.before, change.after, change.images, change.worst_tenth_db) == (10, 11, 2, None)
    assert guard.budgets == ((KIND, 11),)
    # Images under way have the budget before; two more of them change nothing.
    assert [guard.observe(KIND, 10, 20.0) for _ in range(2)] == [None, None]
    assert (guard.mean_db(KIND, 10), guard.worst_tenth_db(KIND)) == (None, None)
    for number in range(MOST_KINDS):
        guard.observe(ImageKind(f"other@{number}", 28, guided=False), 10, 60.0)
    assert guard.budgets == ()


def test_the_mean_is_known_once_there_are_enough() -> None:
    guard = QualityGuard(QualityGuardSettings(target_psnr_db=TARGET), TARGET)
    for figure in range(40, 40 + ENOUGH_TO_ESTIMATE):
        assert guard.mean_db(KIND, 10) is None
        guard.observe(KIND, 10, float(figure))
    assert guard.mean_db(KIND, 10) == pytest.approx(44.5)
    assert guard.mean_db(ImageKind("other", 28, guided=False), 10) is None
