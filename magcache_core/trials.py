"""Try schedules out: of each number of computed steps, the one whose images are closest to the uncached ones.

Predicted costs add up what reuse does to the latents of an uncached run. A cached run answers: its computed steps see
latents that have drifted, mistakes of neighbouring segments may cancel, and not every distance in latents shows in a
image. So the predictions only name candidates here, evenly spaced schedules are others, and runs decide, with a short
local search around the best.

The best of so many is in part the luckiest: on the runs that chose it, it looks better than it is. So the best few of
each number of computed steps are run again on prompts that nothing else used, and those runs say which is kept and how
good it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from magcache_core.correct import LEAST_SQUARES, VELOCITY_MODES, evenly_corrected
from magcache_core.hooks import apply_mag_cache, remove_mag_cache
from magcache_core.plan_data import COMPUTE, REUSE, Plan, Trial, computed_steps
from magcache_core.planner import corrected_plans, evenly_spaced, fewest_steps, fill, plan, whole_plan
from magcache_core.profile_data import Profile

MODES = ("linear", "corrected", LEAST_SQUARES)
"""Reuse modes that are tried; plain reuse was never the closest, and ``fitted`` at one number of computed steps."""
GUIDED_MODES = (*MODES, "residual")
"""The same under true CFG, which multiplies what an extrapolation gets wrong: there plain reuse may be the closest."""
FINALISTS = 3
"""The closest schedules of each number of computed steps, which held-out runs decide between."""
LEAST = 1e-5
"""Distance (100 dB) at which equal images count, so that its logarithm is finite."""


def try_schedules(
    transformer: nn.Module,
    run: Callable[[], torch.Tensor],
    profile: Profile,
    moves: int = 6,
    budgets: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
    judge: Callable[[], torch.Tensor] | None = None,
) -> tuple[Trial, ...]:
    """The best schedule found for each number of computed steps below ``profile.steps``, by runs of a pipeline.

    Args:
        transformer: the model that ``run`` calls.
        run: one run with ``profile.steps`` steps, always from the same noise; images in [0, 1], (rows, 3, height,
            width).
        progress: called after each number of computed steps.
        judge: as ``run``, of held-out prompts; it decides between the `finalists`. Without it ``run`` does.

    The other arguments and the result are those of `search`.
    """
    error_of = _errors(transformer, run)
    tried: list[Trial] = []
    trying = search(profile, moves, budgets, seed, progress)
    candidate = next(trying)
    while True:
        error = error_of(candidate)
        tried.append(Trial(candidate.schedule, candidate.reuse, error))
        try:
            candidate = trying.send(error)
        except StopIteration as end:
            found: tuple[Trial, ...] = end.value
            break
    if judge is None:
        return found
    judged_error_of = _errors(transformer, judge)
    judged = []
    for best in found:
        known = [
            replace(one, error=judged_error_of(fill(profile, one.schedule, one.reuse)))
            for one in finalists(tried, best.computed)
        ]
        judged.append(min(known, key=_error, default=best))
    return never_rising(judged)


def _errors(transformer: nn.Module, run: Callable[[], torch.Tensor]) -> Callable[[Plan], float]:
    """What tells the `mean_error` of a plan's images in ``run``."""
    reference = as_served(run())

    def error_of(followed: Plan) -> float:
        apply_mag_cache(transformer, followed)
        try:
            return mean_error(distances(as_served(run()), reference))
        finally:
            remove_mag_cache(transformer)

    return error_of


def finalists(tried: Iterable[Trial], computed: int, most: int = FINALISTS) -> list[Trial]:
    """The closest of ``tried`` with ``computed`` computed steps, the closest first."""
    return sorted((trial for trial in tried if trial.computed == computed), key=_error)[:most]


def never_rising(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """``trials`` by rising number of computed steps, no error above that of fewer.

    A smaller number that did better by luck bounds what a larger one is expected to do.
    """
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: trial.computed):
        found.append(trial if not found else replace(trial, error=min(trial.error, found[-1].error)))
    return tuple(found)


def search(
    profile: Profile,
    moves: int = 6,
    budgets: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Generator[Plan, float, tuple[Trial, ...]]:
    """Search for the best schedule of each number of computed steps: yields plans and is sent their `mean_error`.

    Equal errors lead to equal plans, so a search that was cut short goes on when it is sent what it was sent before.

    Args:
        profile: measured costs, which name candidates and fit weights.
        moves: schedules to try beside the candidates, each with one computed step of the best so far moved.
        budgets: numbers of computed steps to try; the others keep the profile's trials, where it has them. By default
            all.
        seed: of the moves.
        progress: called after each number of computed steps.

    Returns:
        By rising number of computed steps; errors never rise.
    """
    rng = random.Random(seed)
    known: dict[tuple[str, str], Trial] = {}

    def tried(candidate: Plan) -> Generator[Plan, float, Trial]:
        key = candidate.schedule, candidate.reuse
        if key not in known:
            known[key] = Trial(*key, (yield candidate))
        return known[key]

    found: list[Trial] = []
    kept = {trial.computed: trial for trial in profile.trials}
    for budget in range(fewest_steps(profile), profile.steps):
        before = found[-1] if found else None
        if budgets is not None and budget not in budgets:
            if budget not in kept:
                continue
            best = kept[budget]
        else:
            first, *others = _candidates(profile, budget, before, kept.get(budget))
            best = yield from tried(first)
            for candidate in others:
                best = min(best, (yield from tried(candidate)), key=_error)
            for _ in range(moves):
                moved = fill(profile, _moved(best.schedule, profile.protected_steps, rng), best.reuse)
                best = min(best, (yield from tried(moved)), key=_error)
        found.append(best)
        progress()
    return never_rising(found)


def _candidates(profile: Profile, budget: int, before: Trial | None, known: Trial | None) -> Iterator[Plan]:
    """Planned and evenly spaced schedules, the best with a step less and its longest segment halved, and ``known``.

    Under true CFG the plan for velocities knows best where steps must be close, so that all modes try its schedule.
    """
    if known is not None:
        yield fill(profile, known.schedule, known.reuse)
    yield from corrected_plans(profile, budget)
    if (whole := whole_plan(profile, budget)) is not None:
        yield whole
    halved = []
    if before is not None and before.computed == budget - 1:
        longest = max(before.schedule.split(COMPUTE), key=len)
        middle = before.schedule.index(COMPUTE + longest) + 1 + len(longest) // 2
        halved.append(_with(before.schedule, middle, COMPUTE))
    guided = profile.true_cfg_scale is not None
    dense = [plan(profile, budget=budget, reuse="corrected").schedule] if guided else []
    for mode in GUIDED_MODES if guided else MODES:
        even = evenly_corrected if mode in VELOCITY_MODES else evenly_spaced
        yield plan(profile, budget=budget, reuse=mode)
        for schedule in (even(profile.steps, budget), *dense, *halved):
            if all(schedule[step] == COMPUTE for step in profile.protected_steps):
                yield fill(profile, schedule, mode)


def _error(trial: Trial) -> float:
    return trial.error


def as_served(images: torch.Tensor) -> torch.Tensor:
    """``images`` in [0, 1] in steps of 1/255, (rows, 3, height, width)."""
    return (images.float().clamp(0, 1) * 255).round() / 255


def distances(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Root mean square over the pixels of each image, (rows,)."""
    return (images - reference).square().flatten(1).mean(dim=1).sqrt()


def mean_error(distances: torch.Tensor) -> float:
    """The geometric mean of `distances`: the error of a `Trial`."""
    return distances.clamp(min=LEAST).log().mean().exp().item()


def _moved(schedule: str, protected: tuple[int, ...], rng: random.Random) -> str:
    """``schedule`` with one computed step a step earlier or later, where that is free; unchanged where it is not."""
    step = rng.choice(computed_steps(schedule))
    to = step + rng.choice((-1, 1))
    if step == 0 or step in protected or not 0 < to < len(schedule):
        return schedule
    return _with(_with(schedule, step, REUSE), to, COMPUTE) if schedule[to] == REUSE else schedule


def _with(schedule: str, step: int, mark: str) -> str:
    return schedule[:step] + mark + schedule[step + 1 :]
