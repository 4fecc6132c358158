"""A run measured step by step, against sums worked out by hand."""

from __future__ import annotations

import pytest
import torch

from magcache_core.run_sums import BranchSums, RunMeasurement

STEPS, ROWS, TOKENS, DIM, CHANNELS = 5, 2, 6, 8, 4
SIGMAS = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]


def projected(residual: torch.Tensor) -> torch.Tensor:
    return residual[..., :CHANNELS] * 3.0


def run(seed: int, gram: torch.Tensor | None = None) -> tuple[list[torch.Tensor], RunMeasurement]:
    generator = torch.Generator().manual_seed(seed)
    residuals = [torch.randn(ROWS, TOKENS, DIM, generator=generator) for _ in range(STEPS)]
    measurement = RunMeasurement(SIGMAS, gram=gram)
    for residual in residuals:
        measurement.add(residual, projected(residual), projected)
    return residuals, measurement


def test_a_segment_is_the_summed_error_of_its_reused_steps() -> None:
    residuals, measurement = run(0)
    sums = measurement.sums
    moved = [(projected(residuals[1]) - projected(residuals[i])) * (SIGMAS[i + 1] - SIGMAS[i]) for i in (2, 3)]
    assert float(sums.pairwise["residual"][1, 1, 2]) == pytest.approx(float(moved[1].square().sum()), rel=1e-5)
    assert float(sums.segments["residual"][1, 1, 2]) == pytest.approx(float(sum(moved).square().sum()), rel=1e-5)
    t = (SIGMAS[3] - SIGMAS[2]) / (SIGMAS[2] - SIGMAS[0])
    linear = residuals[2] * (1 + t) - residuals[0] * t
    error = (projected(linear) - projected(residuals[3])) * (SIGMAS[4] - SIGMAS[3])
    assert float(sums.segments["linear"][2, 2, 1]) == pytest.approx(float(error.square().sum()), rel=1e-4)
    flat = torch.stack([residual.flatten() for residual in residuals]).double()
    torch.testing.assert_close(sums.gram, flat @ flat.T / TOKENS, rtol=1e-5, atol=1e-5)
    moving = torch.stack([projected(residual).flatten() for residual in residuals]).double()
    torch.testing.assert_close(sums.velocities, moving @ moving.T)


def test_sums_of_runs_add_up() -> None:
    first, second = run(0)[1].sums, run(1)[1].sums
    both = first + second
    assert both.rows == 2 * ROWS
    finite = torch.isfinite(both.segments["linear"])
    assert bool((finite == torch.isfinite(first.segments["linear"])).all())
    mean = (first.segments["linear"] + second.segments["linear"])[finite] / (2 * ROWS)
    torch.testing.assert_close(both.costs([1.0] * STEPS).segments["linear"][finite], mean.sqrt())
    assert both.curve([1.0] * STEPS).norm_ratios[0] == 1.0


def test_fitted_weights_are_those_of_all_runs_so_far() -> None:
    def entry(sums: BranchSums) -> float:
        return float(sums.segments["fitted"][2, 1, 1])

    first, alone = run(0)[1].sums, run(1)[1].sums
    after = run(1, first.gram)[1].sums
    assert entry(after) > entry(alone) * 1.001, "fitted to two runs, weights are worse for one of them"
    torch.testing.assert_close(after.segments["linear"], alone.segments["linear"])


def test_a_run_cut_short_has_no_sums() -> None:
    measurement = RunMeasurement(SIGMAS)
    residual = torch.ones(1, TOKENS, DIM)
    measurement.add(residual, projected(residual), projected)
    with pytest.raises(ValueError, match="1 of its 5 steps"):
        _ = measurement.sums
