"""A plan's digest covers all that ranks do; image-to-image begins where diffusers begins."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from app.messages import FIRST_DIGEST, BranchStep, RowStep, StepPlan, first_step, plan_digest, steps_of_share
from tests.local_group import job


def test_a_digest_depends_on_every_field() -> None:
    branch = BranchStep("cond", False, (0.5,), 2)
    row = RowStep("a/0", 3, (branch,), True, False)
    plan = StepPlan(1, "", (job("a/0"),), (row,), ("b/0",))
    others = {
        BranchStep: {"branch": "uncond", "compute": True, "weights": (0.25,), "residuals_kept": 1},
        RowStep: {"row_id": "c/0", "step": 4, "branches": (branch, branch), "last": False, "preview": True}
        | {"move": (0.5,), "estimate": (0.25,)},
        StepPlan: {"sequence": 2, "admit": (job("a/0", seed=8),), "rows": (), "drop": (), "background": True},
    }
    for message, values in others.items():
        assert set(values) == {field.name for field in fields(message)} - {"digest"}
    altered = [replace(plan, **{name: value}) for name, value in others[StepPlan].items()]
    altered += [replace(plan, rows=(replace(row, **{name: value}),)) for name, value in others[RowStep].items()]
    altered += [
        replace(plan, rows=(replace(row, branches=(replace(branch, **{name: value}),)),))
        for name, value in others[BranchStep].items()
    ]
    digests = {plan_digest(FIRST_DIGEST, one) for one in [plan, *altered]}
    assert len(digests) == 1 + len(altered)
    assert plan_digest("1" * 16, plan) not in digests


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(28, None, 0), (28, 1.0, 0), (28, 0.6, 11), (10, 0.55, 4), (4, 0.1, 3), (1, 0.1, 0), (28, 1e-20, 27)],
)
def test_strength_is_a_share_of_the_steps_and_at_least_one(steps: int, strength: float | None, first: int) -> None:
    assert first_step(steps, strength) == first


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.5, 28, 14), (0.25, 10, 3), (10 / 28, 28, 10), (0.1, 30, 3)]
)
def test_a_share_of_the_steps_is_rounded_up(share: float, steps: int, expected: int) -> None:
    assert steps_of_share(share, steps) == expected
