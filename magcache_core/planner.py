"""The best schedule for a budget: dynamic programming over a profile's segment costs.

The cost of a segment depends on where it begins, on its length and on the gap to the computed step before
(`magcache_core.segment_costs`), so the state of the recursion is the pair (newest computed step, gap). Planning ahead
is possible because a cache decision never looks at the data. Choosing a whole trajectory at once is the idea of LeMiCa
and DPCache (arXiv 2602.22654); the costs here are measured in latent space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.correct import LEAST_SQUARES, VELOCITY_MODES, evenly_corrected
from magcache_core.fit import fitted_weights, resample_gram
from magcache_core.plan_data import COMPUTE, REUSE, Plan, computed_steps, schedule_of
from magcache_core.profile_data import Profile
from magcache_core.reuse import check_reuse
from magcache_core.segment_costs import SegmentCosts, corrected_costs, segment_costs
from magcache_core.velocity_plan import best_as_a_whole


def plan(
    profile: Profile,
    steps: int | None = None,
    *,
    budget: int | None = None,
    max_error: float | None = None,
    reuse: str | None = None,
    retention_ratio: float | None = None,
    max_skip_steps: int | None = None,
    branch: str = "cond",
) -> Plan:
    """The schedule with the least predicted error for a budget, or the cheapest within an error.

    Where the profile has trials, and neither a reuse mode nor bounds are asked for, a budget gets what came closest
    when it was tried out. At other step counts than the profile's that is an evenly spaced schedule, with ``linear``
    reuse up to half of the steps, and below two fifths of them where the profile reuses velocities: trials
    come near it, and images are closer than with a plan (docs/magcache.md has the figures). ``predicted_error`` is what
    is predicted for that schedule: among plans it falls with the budget, among trials the measured error does.

    Args:
        profile: costs to plan with. Where it has only ratios, a reused step costs |1 - product of ratios|.
        steps: denoising steps of the request; the profile's by default.
        budget: computed steps; the plan has exactly as many.
        max_error: predicted error that the plan must not exceed, in the unit of its costs; exactly one of the two.
        reuse: one of `REUSE_MODES`; the trial's or else the profile's by default.
        retention_ratio: fraction of the first steps that always compute.
        max_skip_steps: most reused steps in a row. These two keep the rule from what magnitudes don't show, so where
            the profile has only ratios they are the profile's by default. Measured costs show it: then only the first
            step must compute, and segments may be as long as the measured ones.
        branch: CFG branch whose costs count.

    Raises:
        ConfigError: a setting is out of range, or no schedule has this budget (the message gives the range).
    """
    free = reuse is None and retention_ratio is None and max_skip_steps is None
    reuse = check_reuse(reuse if reuse is not None else profile.reuse)
    config = _bounds(profile, steps, retention_ratio, max_skip_steps, branch)
    if (budget is None) == (max_error is None):
        raise ConfigError("budget", budget, "given, or max_error, but not both")
    if max_error is not None and not max_error >= 0:
        raise ConfigError("max_error", max_error, "a number >= 0")
    fewest = _fewest(_forced(config), config.max_skip_steps)
    if budget is not None:
        _check_budget(budget, fewest, config.num_inference_steps)
        if free and (tried := _tried(profile, config.num_inference_steps, budget)):
            return fill(profile, *tried, branch)
    search = _Search(segment_costs(profile, config, reuse, branch), config)
    count = fewest if budget is None else budget
    while max_error is not None and search.error(count) > max_error:
        count += 1
    found = search.plan(count, reuse)
    return _filled(profile, found, branch)


def _check_budget(budget: int, fewest: int, steps: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or not fewest <= budget <= steps:
        allowed = f"an integer from {fewest} to {steps} for these steps, retention and max_skip_steps"
        raise ConfigError("budget", budget, allowed)


def _tried(profile: Profile, steps: int, budget: int) -> tuple[str, str] | None:
    """The schedule and the reuse mode that trials recommend, if they do."""
    if steps == profile.steps:
        return next(((one.schedule, one.reuse) for one in profile.trials if one.computed == budget), None)
    # Under true CFG the first steps change most by far, and evenly spaced steps miss it.
    if not profile.trials or profile.protected_steps or profile.true_cfg_scale is not None:
        return None
    if profile.reuse in VELOCITY_MODES:
        return (evenly_corrected(steps, budget), profile.reuse) if 5 * budget < 2 * steps else None
    return (evenly_spaced(steps, budget), "linear") if 2 * budget <= steps else None


def fewest_steps(
    profile: Profile,
    steps: int | None = None,
    *,
    retention_ratio: float | None = None,
    max_skip_steps: int | None = None,
    branch: str = "cond",
) -> int:
    """The smallest budget that `plan` takes with the same arguments.

    Raises:
        ConfigError: a setting is out of range.
    """
    config = _bounds(profile, steps, retention_ratio, max_skip_steps, branch)
    return _fewest(_forced(config), config.max_skip_steps)


def _bounds(
    profile: Profile, steps: int | None, retention_ratio: float | None, max_skip_steps: int | None, branch: str
) -> MagCacheConfig:
    """What bounds a plan: steps that must compute, and the longest segment, which is no longer than a measured one."""
    table = profile.branch(branch).costs
    config = profile.config(steps, branch=branch, retention_ratio=retention_ratio, max_skip_steps=max_skip_steps)
    if table is None:
        return config
    longest = min(
        table.max_skip if max_skip_steps is None else config.max_skip_steps,
        table.longest(config.num_inference_steps),
    )
    return replace(config, retention_ratio=0.0 if retention_ratio is None else retention_ratio, max_skip_steps=longest)


def _forced(config: MagCacheConfig) -> list[bool]:
    """For each step, whether it must compute: the first, the retained and the protected ones."""
    retained = max(config.retained_steps, 1)
    return [step < retained or step in config.protected for step in range(config.num_inference_steps)]


def _allows(schedule: str, forced: Sequence[bool], longest: int) -> bool:
    """Whether every step computes that must, and no more than ``longest`` in a row reuse."""
    computes = all(mark == COMPUTE for mark, must in zip(schedule, forced, strict=True) if must)
    return computes and max(map(len, schedule.split(COMPUTE))) <= longest


def _fewest(forced: Sequence[bool], longest: int) -> int:
    """Least number of computed steps when no more than ``longest`` in a row may reuse."""
    count, reused = 0, 0
    for must in forced:
        if must or reused == longest:
            count, reused = count + 1, 0
        else:
            reused += 1
    return count


def fill(profile: Profile, schedule: str, reuse: str, branch: str = "cond") -> Plan:
    """A plan that follows a given schedule (the threshold rule's, say) with a reuse mode.

    Unlike `plan`, it may hold runs of reused steps longer than any measured; their cost is extrapolated.

    Args:
        profile: where ``fitted`` weights, ratios and costs come from.
        schedule: ``C`` and ``.``, one character per step.
        reuse: one of `REUSE_MODES`.
        branch: CFG branch.

    Raises:
        ConfigError: ``fitted`` without measured costs, or not a schedule.
    """
    made = Plan(schedule, check_reuse(reuse))
    longest = max(len(run) for run in schedule.split(COMPUTE))
    config = profile.config(len(schedule), branch=branch, max_skip_steps=longest)
    costs = segment_costs(profile, config, reuse, branch)
    made = replace(
        made,
        ratios=config.ratios,
        predicted_error=costs.error(sum(costs.estimate(*segment) for segment in segments(schedule))),
        unit=costs.unit,
    )
    return _filled(profile, made, branch)


def evenly_spaced(steps: int, budget: int) -> str:
    """The schedule whose ``budget`` computed steps are as evenly spaced as whole steps allow."""
    return schedule_of((i * steps // budget for i in range(budget)), steps)


def segments(schedule: str) -> list[tuple[int, int, int]]:
    """(computed step, gap to the one before or 0, reused steps after it) of each segment of a schedule."""
    computed = computed_steps(schedule)
    ends = [*computed[1:], len(schedule)]
    gaps = [0, *(b - a for a, b in pairwise(computed))]
    return [(a, gap, end - a - 1) for a, gap, end in zip(computed, gaps, ends, strict=True)]


def _filled(profile: Profile, made: Plan, branch: str) -> Plan:
    """``made`` with what its reuse mode takes from measured costs."""
    table = profile.branch(branch).costs
    steps = len(made.schedule)
    if made.reuse == "fitted":
        if table is None:
            raise ConfigError("reuse", "fitted", f"another mode: profile {profile.name!r} has ratios only")
        return replace(made, weights=fitted_weights(resample_gram(table.gram, steps), made.schedule))
    if made.reuse == LEAST_SQUARES and table is not None and table.velocities is not None:
        products = resample_gram(table.velocities, steps).tolist()
        return replace(made, products=tuple(tuple(row) for row in products))
    return made


def corrected_plans(profile: Profile, budget: int) -> Iterator[Plan]:
    """Plans at the profile's step count that weigh predictions differently; none where velocities weren't measured."""
    config, table = _bounds(profile, None, None, None, "cond"), profile.branch().costs
    if table is None or table.velocities is None:
        return
    for weighing in ((0.3, False), (1.0, False), (3.0, False), (5.0, True), (10.0, True)):
        values = corrected_costs(table, profile.sigmas, profile.steps, config.max_skip_steps + 1, *weighing)
        yield _Search(SegmentCosts(values, "latent"), config).plan(budget, "corrected")


def whole_plan(profile: Profile, budget: int) -> Plan | None:
    """The plan at the profile's step count that is the best as a whole; None where velocities weren't measured.

    See `magcache_core.velocity_plan`. It takes some 50 ms for 28 steps.
    """
    starts = [made.schedule for made in corrected_plans(profile, budget)]
    table = profile.branch().costs
    if not starts or table is None or table.velocities is None:
        return None
    config = _bounds(profile, None, None, None, "cond")
    forced, longest = _forced(config), config.max_skip_steps
    if _allows(even := evenly_corrected(profile.steps, budget), forced, longest):
        starts.append(even)
    gram, levels = table.velocities.double(), [*profile.sigmas, 0.0]
    return fill(profile, best_as_a_whole(gram, levels, starts, longest, forced), "corrected")


class _Search:
    """Layer c holds, for each newest computed step and gap before it, the least cost of c computed steps so far."""

    def __init__(self, costs: SegmentCosts, config: MagCacheConfig) -> None:
        self._costs = costs
        self._ratios = config.ratios
        self.steps, gaps, self._lengths = costs.values.shape
        must = _forced(config)
        forced = torch.tensor(must + [False] * self._lengths)
        # [a, l]: some step of a + 1 ... a + l has to compute, so that no segment may hold it.
        blocked = forced.unfold(0, self._lengths, 1)[: self.steps].clone()
        blocked[:, 0] = False
        blocked = blocked.cummax(dim=1).values
        self._values = torch.where(blocked[:, None, :], torch.inf, costs.values)
        # Computed step n with gap g follows n - g, whose segment holds g - 1 reused steps.
        step, gap = torch.arange(self.steps)[:, None], torch.arange(gaps)[None, :]
        nowhere = self.steps * self._lengths
        self._source = torch.where((gap > 0) & (step >= gap), (step - gap) * self._lengths + gap - 1, nowhere)
        tail = torch.arange(min(self._lengths, self.steps))
        self._ends = (self.steps - 1 - tail) * self._lengths + tail
        # By layer: least cost up to a computed step with its own segment, [a, l] flat and an infinite entry for
        # "nowhere"; and the gap that gave it.
        self._best = torch.full((self.steps, nowhere + 1), torch.inf)
        self._gaps = torch.zeros((self.steps, self.steps, self._lengths), dtype=torch.long)
        self._filled = 0

    def _fill(self, count: int) -> None:
        for layer in range(self._filled, count):
            if layer == 0:
                state = torch.full(self._source.shape, torch.inf)
                state[0, 0] = 0.0
            else:
                state = self._best[layer - 1].take(self._source)  # (steps, gaps + 1)
            best = self._best[layer, :-1].view(self.steps, self._lengths)
            torch.min(state[:, :, None] + self._values, dim=1, out=(best, self._gaps[layer]))
        self._filled = max(self._filled, count)

    def _last(self, count: int) -> tuple[float, int]:
        """Least total with ``count`` computed steps, and the length of its last segment."""
        self._fill(count)
        value, length = self._best[count - 1].take(self._ends).min(dim=0)
        return float(value), int(length)

    def error(self, count: int) -> float:
        """Predicted error of the best schedule with ``count`` computed steps."""
        return self._costs.error(self._last(count)[0])

    def plan(self, count: int, reuse: str) -> Plan:
        """The best schedule with ``count`` computed steps."""
        length = self._last(count)[1]
        step = self.steps - 1 - length
        marks = ""
        for layer in range(count - 1, -1, -1):
            gap = int(self._gaps[layer][step, length])
            marks = COMPUTE + REUSE * length + marks
            step, length = step - gap, gap - 1
        return Plan(
            schedule=marks,
            reuse=reuse,
            predicted_error=self.error(count),
            ratios=self._ratios,
            unit=self._costs.unit,
        )
