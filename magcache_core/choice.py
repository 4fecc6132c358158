"""The plan for a request: from a profile and the settings that the request names."""

from __future__ import annotations

from typing import Any

from magcache_core.config import ConfigError
from magcache_core.plan_data import Plan
from magcache_core.planner import fewest_steps, fill, plan
from magcache_core.profile_data import Profile
from magcache_core.state import schedule


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
) -> Plan:
    """The plan that a request follows.

    A request that names a ``budget`` or a ``max_error`` gets the best schedule for it; one that names a ``threshold``
    gets the threshold rule's; one that names none of them gets what the profile recommends: where costs were measured,
    the best schedule for the recommended budget, or at another step count for the budget of the cheapest plan that is
    predicted to be as close to the uncached run, else the threshold rule with the profile's settings.

    Args:
        profile: the model's profile.
        steps: denoising steps of the request; the profile's by default.
        branch: CFG branch.
        threshold, max_skip_steps, retention_ratio: settings of the rule; the last two hold for plans as well.
        budget: computed steps.
        max_error: predicted error not to exceed.
        reuse: one of `REUSE_MODES`; the profile's by default.

    Raises:
        ConfigError: a value is out of range, or a threshold is given together with a budget or an error.
    """
    rule: dict[str, Any] = {"max_skip_steps": max_skip_steps, "retention_ratio": retention_ratio}
    if threshold is None and budget is None and max_error is None and profile.budget is not None:
        budget = profile.budget
        if steps not in (None, profile.steps):
            planned = plan(profile, budget=budget, reuse=profile.reuse, branch=branch)
            budget = plan(
                profile, steps, max_error=planned.predicted_error, reuse=profile.reuse, branch=branch, **rule
            ).computed
        budget = max(budget, fewest_steps(profile, steps, branch=branch, **rule))
    if budget is not None or max_error is not None:
        if threshold is not None:
            raise ConfigError("threshold", threshold, "left out beside a budget or a max_error")
        return plan(profile, steps, budget=budget, max_error=max_error, reuse=reuse, branch=branch, **rule)
    config = profile.config(steps, branch=branch, threshold=threshold, **rule)
    return fill(profile, schedule(config), reuse or profile.reuse, branch)
