"""The plan for a request: from a profile and the settings that the request names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from magcache_core.config import ConfigError
from magcache_core.plan_data import Plan
from magcache_core.planner import fewest_steps, fill, plan
from magcache_core.profile_data import Profile
from magcache_core.state import schedule

FAR = 1.5
"""A guidance so many times the calibrated one is far beyond it."""
MORE_GUIDANCE, MORE_TRUE_CFG = 2.0, 1.5
"""By these the recommended computed steps grow there: velocities bend more (docs/magcache.md has the figures)."""
MORE_UNMEASURED = 1.2
FIRST_UNMEASURED = 0.2
"""Under true CFG that no profile was measured with: growth of the recommended computed steps, and the share of the
first steps that compute. True CFG's velocities change most there, by half of themselves and more from step to step."""


def choose(
    profile: Profile,
    steps: int | None = None,
    *,
    branch: str = "cond",
    threshold: float | None = None,
    max_skip_steps: int | None = None,
    retention_ratio: float | None = None,
    budget: int | None = None,
    max_error: float | None = None,
    reuse: str | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
) -> Plan:
    """The plan that a request follows.

    A request that names a ``budget`` or a ``max_error`` gets the best schedule for it; one that names a ``threshold``
    gets the threshold rule's; one that names none of them gets what the profile recommends: where costs were measured,
    the best schedule for the recommended budget, or at another step count for the budget of the cheapest plan that is
    predicted to be as close to the uncached run, else the threshold rule with the profile's settings.

    Far beyond the guidance that the profile was measured with, the recommended budget is twice as large, and far beyond
    its true CFG half as large again. Where true CFG runs and costs were measured without it, the last residual is
    reused as it is (true CFG multiplies what separates the branches, and with it what a prediction gets wrong), the
    first fifth of the steps computes, and the recommended budget is a fifth larger. The plan says why.

    Args:
        profile: the model's profile.
        steps: denoising steps of the request; the profile's by default.
        branch: CFG branch.
        threshold, max_skip_steps, retention_ratio: settings of the rule; the last two hold for plans as well.
        budget: computed steps.
        max_error: predicted error not to exceed.
        reuse: one of `REUSE_MODES`; the profile's by default.
        guidance_scale: distilled guidance of the request; that of the profile by default.
        true_cfg_scale: scale of true CFG, which runs above 1.

    Raises:
        ConfigError: a value is out of range, or a threshold is given together with a budget or an error.
    """
    rule: dict[str, Any] = {"max_skip_steps": max_skip_steps, "retention_ratio": retention_ratio}
    unmeasured = true_cfg_scale > 1 and profile.true_cfg_scale is None and profile.branch(branch).costs is not None
    reasons = [f"profile {profile.name} was measured without true CFG"] if unmeasured else []
    if threshold is None and budget is None and max_error is None and profile.budget is not None:
        more = MORE_UNMEASURED if unmeasured else 1.0
        for name, asked, measured, growth in (
            ("guidance_scale", guidance_scale, profile.guidance_scale, MORE_GUIDANCE),
            ("true_cfg_scale", true_cfg_scale, profile.true_cfg_scale, MORE_TRUE_CFG),
        ):
            if asked is not None and measured is not None and asked > FAR * measured:
                more *= growth
                reasons.append(f"{name} {asked:g} is far beyond {measured:g}, which the profile was measured with")
        budget = _recommended(profile, steps, branch, rule, more)
    if threshold is not None and (budget is not None or max_error is not None):
        raise ConfigError("threshold", threshold, "left out beside a budget or a max_error")
    plain = unmeasured and reuse is None
    if plain:
        reuse = profile.reuse  # what trials found goes with their mode
        if retention_ratio is None and threshold is None:
            rule["retention_ratio"] = _first_steps(profile, steps, branch, max_skip_steps, budget)
    if budget is not None or max_error is not None:
        made = plan(profile, steps, budget=budget, max_error=max_error, reuse=reuse, branch=branch, **rule)
    else:
        config = profile.config(steps, branch=branch, threshold=threshold, **rule)
        made = fill(profile, schedule(config), reuse or profile.reuse, branch)
    if plain:
        made = fill(profile, made.schedule, "residual", branch)
    return replace(made, reason="; ".join(reasons))


def _recommended(profile: Profile, steps: int | None, branch: str, rule: dict[str, Any], more: float) -> int:
    """The computed steps that the profile recommends at ``steps`` steps, times ``more``."""
    budget = profile.budget
    if steps not in (None, profile.steps):
        planned = plan(profile, budget=budget, reuse=profile.reuse, branch=branch)
        error = planned.predicted_error
        budget = plan(profile, steps, max_error=error, reuse=profile.reuse, branch=branch, **rule).computed
    assert budget is not None
    grown = min(math.ceil(more * budget), profile.steps if steps is None else steps)
    return max(grown, fewest_steps(profile, steps, branch=branch, **rule))


def _first_steps(
    profile: Profile, steps: int | None, branch: str, max_skip_steps: int | None, budget: int | None
) -> float | None:
    """The share of the first steps that compute under true CFG; None where ``budget`` is too small for it."""
    bounds: dict[str, Any] = {"branch": branch, "max_skip_steps": max_skip_steps}
    fewest = fewest_steps(profile, steps, retention_ratio=FIRST_UNMEASURED, **bounds)
    return FIRST_UNMEASURED if budget is None or budget >= fewest else None
