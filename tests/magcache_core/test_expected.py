"""Trials as a scale of quality: exact for their own schedules, interpolated for others of their mode."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from magcache_core import Plan, Trial, choose, fill, load_profile, plan
from magcache_core.expected import QualityScale

PROFILE = load_profile("flux-tiny")
SCALE = QualityScale(PROFILE)


def decibels(trial: Trial) -> float:
    return -20 * math.log10(trial.error)


def test_a_tried_schedule_has_what_it_reached() -> None:
    for trial in PROFILE.trials:
        assert SCALE.psnr_db(choose(PROFILE, budget=trial.computed)) == pytest.approx(decibels(trial))


@pytest.mark.parametrize("steps", [12, 20, 50])
def test_another_number_of_steps_is_read_off_by_its_predicted_error(steps: int) -> None:
    plans = [plan(PROFILE, steps, budget=budget, reuse="corrected") for budget in range(steps // 4, steps - 1)]
    found = [(one.predicted_error, SCALE.psnr_db(one)) for one in plans]
    known = sorted((error, decibels) for error, decibels in found if decibels is not None)
    assert len(known) > len(found) / 2
    values = [value for _, value in known]
    assert values == sorted(values, reverse=True)
    assert all(43.0 < value < 78.0 for value in values), "between the trials' ends"


def test_between_two_trials_lies_what_is_between_them() -> None:
    two = replace(PROFILE, trials=tuple(trial for trial in PROFILE.trials if trial.computed in (6, 12)))
    scale = QualityScale(two)
    worse, better = (fill(two, trial.schedule, trial.reuse).predicted_error for trial in two.trials)
    middle = Plan("C" + "." * 27, "corrected", predicted_error=math.sqrt(worse * better))
    assert scale.psnr_db(middle) == pytest.approx(sum(map(decibels, two.trials)) / 2)
    assert scale.psnr_db(replace(middle, predicted_error=better / 2)) == pytest.approx(decibels(two.trials[1]))
    assert scale.psnr_db(replace(middle, predicted_error=worse * 1.01)) is None


@pytest.mark.parametrize(
    "unknown",
    [
        Plan("C" * 28, "corrected"),
        plan(PROFILE, budget=9, reuse="residual"),
        plan(PROFILE, budget=9, reuse="linear"),  # one trial has this mode
        Plan("C" + "." * 27, "corrected", predicted_error=math.inf),
    ],
)
def test_what_trials_do_not_say_is_none(unknown: Plan) -> None:
    assert SCALE.psnr_db(unknown) is None


def test_a_profile_without_trials_says_nothing() -> None:
    scale = QualityScale(replace(PROFILE, trials=()))
    assert scale.psnr_db(choose(PROFILE)) is None
    assert scale.fewest_reaching(20.0) is None


@pytest.mark.parametrize(
    ("floor_db", "computed"), [(28.0, 3), (38.0, 4), (56.0, 7), (65.0, 11), (70.0, 19), (80.0, None)]
)
def test_a_floor_is_reached_by_the_first_trial_that_did(floor_db: float, computed: int | None) -> None:
    assert SCALE.fewest_reaching(floor_db) == computed


def test_worse_trials_bound_better_ones_that_were_predicted_to_be_worse() -> None:
    first, second = (fill(PROFILE, trial.schedule, trial.reuse).predicted_error for trial in PROFILE.trials[-2:])
    assert second < first, "the last trial computes most"
    swapped = (replace(PROFILE.trials[-2], error=1e-4), replace(PROFILE.trials[-1], error=1e-3))
    scale = QualityScale(replace(PROFILE, trials=swapped))
    assert scale.psnr_db(Plan("C" + "." * 27, "corrected", predicted_error=first)) == pytest.approx(60.0)
