"""Sums of runs with both branches of true CFG, against the same by hand."""

from __future__ import annotations

import torch

from magcache_core.row_sums import MeasuredStep, RowMeasurement
from magcache_core.run_sums import RunMeasurement

SIGMAS = (1.0, 0.8, 0.5, 0.2, 0.0)
STEPS = len(SIGMAS) - 1
SCALE = 3.0
Tensors = list[torch.Tensor]


def branch(seed: int) -> tuple[Tensors, Tensors]:
    """Residuals (2, 5, 6) and velocities (2, 5, 3) of each step; a replay takes three values."""
    generator = torch.Generator().manual_seed(seed)
    residuals = [torch.randn(2, 5, 6, generator=generator) for _ in range(STEPS)]
    return residuals, [residual[..., :3].clone() for residual in residuals]


def step_of(residuals: Tensors, velocities: Tensors, step: int) -> MeasuredStep:
    return MeasuredStep(residuals[step], velocities[step], lambda residual: residual[..., :3])


def test_both_branches_have_what_they_make_together() -> None:
    cond, uncond = branch(0), branch(1)
    row = RowMeasurement(SIGMAS, ("cond", "uncond"), SCALE)
    for step in range(STEPS):
        row.add([step_of(*cond, step), step_of(*uncond, step)])
    guided = [b.double() + SCALE * (a.double() - b.double()) for a, b in zip(cond[1], uncond[1], strict=True)]
    products = torch.stack([torch.stack([(a * b).sum() for a in guided]) for b in guided])
    steps = torch.tensor(SIGMAS).diff().double()
    moved = [0.0] + [((guided[i] - guided[i - 1]) * steps[i]).square().sum().item() for i in range(1, STEPS)]
    for sums in row.sums.values():
        torch.testing.assert_close(sums.velocities, products)
        torch.testing.assert_close(sums.moved, torch.tensor(moved, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    assert row.nbytes > 0


def test_the_rest_of_each_is_measured_apart() -> None:
    found = {}
    branches = {"cond": branch(0), "uncond": branch(1)}
    row = RowMeasurement(SIGMAS, tuple(branches), SCALE)
    for step in range(STEPS):
        row.add([step_of(*one, step) for one in branches.values()])
    for name, one in branches.items():
        alone = RunMeasurement(SIGMAS)
        for step in range(STEPS):
            measured = step_of(*one, step)
            alone.add(measured.residual, measured.velocity, measured.replay)
        found[name] = alone.sums
        for field in ("statistics", "gram"):
            assert torch.equal(getattr(row.sums[name], field), getattr(alone.sums, field))
        assert torch.equal(row.sums[name].segments["linear"], alone.sums.segments["linear"])
    single = RowMeasurement(SIGMAS, ("cond",))
    for step in range(STEPS):
        single.add([step_of(*branches["cond"], step)])
    assert torch.equal(single.sums["cond"].velocities, found["cond"].velocities)
    assert torch.equal(single.sums["cond"].moved, found["cond"].moved)
    expected = found["cond"].pairwise["residual"][: STEPS - 1, 0, 1].double()
    torch.testing.assert_close(found["cond"].moved[1:], expected)


def test_weights_are_those_of_all_runs_so_far() -> None:
    def measured(grams: dict[str, torch.Tensor]) -> torch.Tensor:
        row = RowMeasurement(SIGMAS, ("cond", "uncond"), SCALE, grams)
        for step in range(STEPS):
            row.add([step_of(*branch(0), step), step_of(*branch(1), step)])
        return row.sums["uncond"].segments["fitted"]

    generator = torch.Generator().manual_seed(2)
    gram = torch.randn(STEPS, 8, generator=generator, dtype=torch.float64) * 9
    assert not torch.allclose(measured({}), measured({"uncond": gram @ gram.T}))
    assert torch.equal(measured({}), measured({"cond": gram @ gram.T}))
