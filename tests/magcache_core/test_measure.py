"""Measured costs are how far a run's latents really drift."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from magcache_core import Plan, apply_mag_cache, fill, remove_mag_cache
from magcache_core.profile_data import Profile
from tests.magcache_core.prompt_pipe import STEPS, PromptPipe


def drift_of(pipe: FluxPipeline, followed: Plan) -> float:
    """How far the latents of a run with ``followed`` end from those of an uncached one, root mean square over runs."""

    def latents() -> torch.Tensor:
        return PromptPipe(pipe)(
            prompt=["a", "b"],
            num_inference_steps=STEPS,
            width=32,
            height=32,
            guidance_scale=3.5,
            output_type="latent",
            generator=[torch.Generator().manual_seed(0) for _ in range(2)],
        ).images

    uncached = latents()
    apply_mag_cache(pipe.transformer, followed)
    drift = (latents() - uncached).square().sum(dim=(1, 2)).mean().sqrt()
    remove_mag_cache(pipe.transformer)
    return float(drift)


@pytest.mark.parametrize("reuse", ["residual", "linear"])
def test_a_segment_cost_is_the_latents_drift(pipe: FluxPipeline, measured: Profile, reuse: str) -> None:
    """A run whose only reuse is the last segment ends exactly as far away as the table says.

    With one reused step the measured cost has no approximation: the step starts from the uncached run's latents.
    """
    drift = drift_of(pipe, Plan("C" * (STEPS - 1) + ".", reuse))
    costs = measured.branch().costs
    assert costs is not None
    assert costs.segments[reuse][STEPS - 2, 1, 1] == pytest.approx(drift, rel=1e-3)
    assert costs.pairwise[reuse][STEPS - 2, 1, 1] == pytest.approx(drift, rel=1e-3)


def test_the_cost_of_a_predicted_end_is_its_drift(pipe: FluxPipeline, measured: Profile) -> None:
    """Nothing corrects the last segment, so its measured cost has no approximation either."""
    marks = "C" * (STEPS - 2) + ".."
    drift = drift_of(pipe, Plan(marks, "corrected"))
    assert fill(measured, marks, "corrected").predicted_error == pytest.approx(drift, rel=2e-3)


def test_sensitivity_is_the_growth_of_a_displacement(pipe: FluxPipeline, measured: Profile) -> None:
    """The drift at the end of a run that reuses one step is the table's drift there times the step's sensitivity."""
    drift = drift_of(pipe, Plan("CCCC.CCC"))
    costs = measured.branch().costs
    assert costs is not None
    assert costs.sensitivity[-1] == 1.0
    assert costs.segments["residual"][3, 1, 1] * costs.sensitivity[4] == pytest.approx(drift, rel=1e-3)
    assert costs.final("residual", STEPS, 3)[3, 1, 1] == pytest.approx(drift, rel=1e-3)


def test_segments_are_no_longer_than_their_steps_together(measured: Profile) -> None:
    """The norm of a sum is at most the sum of norms (each root mean square over the same runs)."""
    costs = measured.branch().costs
    assert costs is not None
    for mode, segments in costs.segments.items():
        pairwise = costs.pairwise[mode]
        finite = torch.isfinite(segments)
        together = torch.where(finite, pairwise, 0.0).cumsum(dim=2)
        assert bool((segments[finite] <= together[finite] * 1.001 + 1e-6).all())
        assert bool((segments[:, :, 0] == 0).all())
