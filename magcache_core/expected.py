"""What a plan's images are expected to be in dB, and which budget reaches a quality: read off a profile's trials.

A trial is exact for its own schedule. For another one of the same reuse mode its predicted error says how close it is:
what it stands for in dB is interpolated between the trials, for which both are known.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cached_property
from itertools import accumulate

from magcache_core.plan_data import Plan, Trial
from magcache_core.planner import fill
from magcache_core.profile_data import Profile


class QualityScale:
    """The trials of one profile as a scale of quality: mean PSNR against the uncached images."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def psnr_db(self, plan: Plan) -> float | None:
        """The mean PSNR of the images that ``plan`` makes; None where the trials don't say.

        They don't where nothing is reused, where fewer than two trials have the plan's reuse mode, or where it is
        predicted to be worse than any of them. One predicted to be better than all counts as the best of them.
        """
        key = plan.schedule, plan.reuse
        for trial in self._profile.trials:
            if key == (trial.schedule, trial.reuse):
                return reached_db(trial)
        errors, decibels = self._curves.get(plan.reuse, ([], []))
        if len(errors) < 2 or not 0.0 < plan.predicted_error <= errors[-1]:
            return None
        place = bisect_left(errors, plan.predicted_error)
        if place == 0:
            return decibels[0]
        low, high = errors[place - 1], errors[place]
        share = math.log(plan.predicted_error / low) / math.log(high / low)
        return decibels[place - 1] + share * (decibels[place] - decibels[place - 1])

    def fewest_reaching(self, floor_db: float) -> int | None:
        """The fewest computed steps of the profile's own number whose trial reached ``floor_db``; None if none did."""
        return min((trial.computed for trial in self._profile.trials if reached_db(trial) >= floor_db), default=None)

    @cached_property
    def _curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """By reuse mode: rising predicted errors, and what the worst trial up to each one reached, in dB."""
        curves = {}
        for mode in {trial.reuse for trial in self._profile.trials}:
            known = {
                fill(self._profile, trial.schedule, mode).predicted_error: reached_db(trial)
                for trial in reversed(self._profile.trials)
                if trial.reuse == mode
            }
            errors = sorted(error for error in known if 0.0 < error < math.inf)
            curves[mode] = errors, list(accumulate((known[error] for error in errors), min))
        return curves


def reached_db(trial: Trial) -> float:
    """The mean PSNR that the images of ``trial`` had."""
    return -20.0 * math.log10(trial.error)
