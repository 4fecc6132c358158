"""What is tried under true CFG: plain reuse as well, and the plan for velocities with every mode."""

from __future__ import annotations

from dataclasses import replace

from magcache_core import Plan, Profile, Trial, load_profile, plan
from magcache_core.trials import GUIDED_MODES, MODES, search

TINY = load_profile("flux-tiny")


def tried(profile: Profile, best: str) -> tuple[list[Plan], Trial]:
    """The plans of a search for 12 computed steps whose images are closest with the mode ``best``; its result."""
    searching, plans = search(profile, moves=3, budgets=[12]), []
    candidate = next(searching)
    while True:
        plans.append(candidate)
        try:
            candidate = searching.send(0.1 if candidate.reuse == best else 0.2)
        except StopIteration as end:
            return plans, next(trial for trial in end.value if trial.computed == 12)


def test_under_true_cfg_plain_reuse_is_tried_and_can_win() -> None:
    guided = replace(TINY, true_cfg_scale=4.0, trials=())
    plans, best = tried(guided, "residual")
    dense = plan(guided, budget=12, reuse="corrected").schedule
    assert {made.reuse for made in plans} == set(GUIDED_MODES)
    assert {made.reuse for made in plans if made.schedule == dense} == set(GUIDED_MODES)
    assert best.reuse == "residual"


def test_without_true_cfg_it_is_not() -> None:
    plans, best = tried(replace(TINY, trials=()), "linear")
    assert {made.reuse for made in plans} == set(MODES)
    assert best.reuse == "linear"
