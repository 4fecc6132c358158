"""A plan's digest covers all that ranks do."""

from __future__ import annotations

from dataclasses import fields, replace

from app.messages.plans import FIRST_DIGEST, BranchStep, RowStep, StepPlan, plan_digest
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
