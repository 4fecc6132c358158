"""What a rank keeps of a row, and what it adds of it."""

from __future__ import annotations

import torch

from app.engine.geometry import Geometry
from app.engine.rows import Branch, Row
from app.messages.plans import BranchStep
from tests.local_group import job


def branch(text_tokens: int = 3) -> Branch:
    return Branch(text_tokens, torch.zeros(text_tokens, 4), {}, torch.zeros(3, 8))


def row(**branches: Branch) -> Row:
    geometry = Geometry.of(32, 32)
    latents = torch.ones(geometry.tokens, 2, dtype=torch.bfloat16)
    asked = job("a/0", size=(32, 32), steps=3, true_cfg_scale=2.5)
    return Row(asked, 1, geometry, latents, torch.zeros(4), branches, torch.empty(0, 4), ())


def residual(value: float) -> torch.Tensor:
    return torch.full((4, 4), value)


def test_a_branch_keeps_the_newest_residuals_and_adds_their_weighted_sum() -> None:
    kept = branch()
    for value in (1.0, 2.0, 4.0):
        kept.store(residual(value), residuals_kept=2)
    assert [one[0, 0].item() for one in kept.residuals] == [4.0, 2.0]
    assert torch.equal(kept.reuse("a/0", BranchStep("cond", False, (1.5, -0.5))), residual(5.0))
    assert torch.equal(kept.reuse("a/0", BranchStep("cond", False, (0.5,))), residual(2.0))
    assert torch.equal(kept.reuse("a/0", BranchStep("cond", False, (1.0,))), residual(4.0))
    assert [one[0, 0].item() for one in kept.residuals] == [4.0, 2.0], "adding changes nothing that is kept"
    kept.store(residual(8.0), residuals_kept=0)
    assert not kept.residuals


def test_a_row_weighs_its_branches_as_true_cfg_does() -> None:
    conditional, negative = torch.full((4, 2), 3.0), torch.full((4, 2), 1.0)
    guided = row(cond=branch(), uncond=branch())
    assert torch.equal(guided.guided([conditional, negative]), torch.full((4, 2), 1.0 + 2.5 * 2.0))
    assert guided.guided([conditional]) is conditional


def test_a_row_moves_by_its_last_velocities_in_float32() -> None:
    moved = row(cond=branch())
    for value in (1.0, 2.0, 3.0, 4.0):
        moved.keep(torch.full((4, 2), value, dtype=torch.bfloat16), 3)
    displaced = moved.displaced((0.001, 0.0, 1.0))  # of 4, 3 and 2
    assert displaced.dtype is torch.float32
    torch.testing.assert_close(displaced, torch.full((4, 2), 3.004))


def test_memory_and_batches_are_told_by_shapes() -> None:
    one = row(cond=branch(), uncond=branch())
    assert one.residual_bytes == 0
    one.branches["uncond"].store(residual(1.0), residuals_kept=1)
    one.velocities.append(torch.zeros(4, 2))
    assert one.residual_bytes == 4 * 4 * 4 + 4 * 2 * 4
    assert one.batch_key == row(cond=branch()).batch_key
    assert one.batch_key != row(cond=branch(text_tokens=5)).batch_key


def test_copies_of_a_shard_share_the_branches() -> None:
    both = row(cond=branch(), uncond=branch())
    assert {both.owner("cond", 2), both.owner("uncond", 2)} == {0, 1}
    assert both.owner("cond", 1) == both.owner("uncond", 1) == 0
