"""The search with another way to weigh velocities."""

from __future__ import annotations

from benchmarks.corrector_trials import tried
from magcache_core import Plan, load_profile
from magcache_core.trials import finalists


def test_every_schedule_of_velocities_is_run_once_and_residuals_are_not() -> None:
    run: list[Plan] = []

    def error_of(candidate: Plan) -> float:
        run.append(candidate)
        return candidate.predicted_error

    found = tried(load_profile("flux-tiny"), error_of, moves=3, budgets=[6, 7])
    assert {plan.reuse for plan in run} == {"corrected"}
    assert len({plan.schedule for plan in run}) == len(run)
    for budget in (6, 7):
        best = finalists(found, budget)
        assert [trial.reuse for trial in best] == ["corrected"] * 3
        assert best[0].error == min(plan.predicted_error for plan in run if plan.computed == budget)
