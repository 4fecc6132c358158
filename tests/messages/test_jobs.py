"""Image-to-image begins where diffusers begins; a second branch runs only with true CFG."""

from __future__ import annotations

import pytest

from app.messages.jobs import COND, UNCOND, first_step, steps_of_share
from tests.local_group import job


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


def test_the_negative_branch_runs_above_a_scale_of_one() -> None:
    assert job("a/0", true_cfg_scale=1.0).branches == (COND,)
    assert job("a/0", true_cfg_scale=1.1).branches == (COND, UNCOND)
