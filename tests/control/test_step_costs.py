"""Step times follow the ranks, one pause of a rank aside, and split what a plan took among its parts."""

from __future__ import annotations

import pytest

from app.control.request import RowShape
from app.control.step_costs import PlanPart, StepCosts
from app.engine.geometry import Geometry
from app.messages.jobs import MagCacheOptions
from tests.control.simulated_ranks import SimulatedRanks, calibrated, image, step_seconds


def test_one_pause_of_a_rank_does_not_shut_deadlines_out() -> None:
    pause: list[float] = []
    ranks = SimulatedRanks(seconds=lambda part: step_seconds(part) + (pause.pop() if pause else 0.0))
    before = ranks.submit(image("a")).eta_s
    pause.append(60.0)
    ranks.run()
    assert not pause
    assert ranks.submit(image("b")).eta_s == pytest.approx(before, rel=0.05)


def test_estimates_follow_ranks_that_became_slower() -> None:
    slower = 1.0
    ranks = SimulatedRanks(seconds=lambda part: slower * step_seconds(part))
    ranks.submit(image("a"))
    ranks.run()
    slower = 3.0
    for name in "bcde":
        ranks.submit(image(name))
        ranks.run()
    entry = ranks.submit(image("f"))
    ranks.run()
    assert entry.eta_s == pytest.approx(ranks.finished["f/0"].seconds, rel=0.02)


def test_counts_split_the_time_of_mixed_plans() -> None:
    ranks = calibrated()
    before = ranks.admission.counts.computed_seconds, ranks.admission.counts.reused_seconds, ranks.now_s
    for number in range(4):
        ranks.submit(image(str(number), steps=20 + number))
    ranks.run()
    computed = ranks.admission.counts.computed_seconds - before[0]
    reused = ranks.admission.counts.reused_seconds - before[1]
    assert computed + reused == pytest.approx(ranks.now_s - before[2])
    assert 0 < reused < computed


def test_what_reuse_saved_is_what_computing_would_have_taken_longer() -> None:
    ranks = calibrated()
    ranks.submit(image("all", magcache=MagCacheOptions(False)))
    ranks.run()
    saved, started = ranks.admission.counts.saved_seconds, ranks.now_s
    ranks.submit(image("some"))
    ranks.run()
    saved = ranks.admission.counts.saved_seconds - saved
    taken, in_full = ranks.now_s - started, ranks.finished["all/0"].seconds
    assert saved == pytest.approx(in_full - taken, rel=0.05)


def test_a_part_that_was_not_measured_is_scaled_by_tokens_from_the_nearest_that_was() -> None:
    small, large = (RowShape(Geometry.of(side, side), side * side // 256 + 32) for side in (128, 256))
    costs = StepCosts({PlanPart(small, True, 1): 1.0, PlanPart(small, False, 1): 0.1, PlanPart(small, True, 4): 3.0})
    assert costs.seconds(PlanPart(small, True, 4)) == 3.0
    assert costs.seconds(PlanPart(small, True, 2)) == 2.0  # nearest is one row
    assert costs.seconds(PlanPart(small, False, 4)) == pytest.approx(0.4)
    assert costs.seconds(PlanPart(large, True, 1)) == pytest.approx(3.0 * large.tokens / (4 * small.tokens))
    costs.observe((PlanPart(small, True, 2),), 1.5)
    assert 1.5 < costs.seconds(PlanPart(small, True, 2)) < 1.6  # a measurement tells more than a guess
