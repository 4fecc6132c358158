"""Answers of a run that predicts and corrects: where the model runs, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from magcache_core import Plan, apply_mag_cache, velocity_steps
from magcache_core.velocity_run import VelocityRun, sample_of
from tests.magcache_core.hooked import call_flux


def test_answers_keep_the_form_of_the_models(flux: FluxTransformer2DModel) -> None:
    apply_mag_cache(flux, Plan("C.", "corrected"), sigmas=[1.0, 0.5])
    first = call_flux(flux, 1.0)
    assert torch.equal(call_flux(flux, 0.5), first)  # along the only velocity; `call_flux` reads ``.sample``
    assert first.dtype == torch.float32


@pytest.mark.parametrize("form", [lambda sample: (sample,), lambda sample: Transformer2DModelOutput(sample=sample)])
def test_the_model_runs_where_the_schedule_computes(form: Callable[[torch.Tensor], Any]) -> None:
    run = VelocityRun(velocity_steps("C.C", [1.0, 0.6, 0.3, 0.0]), first=4)
    velocities = iter([torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.full((1, 2, 3), 2.0, dtype=torch.bfloat16)])
    left = []
    for step in (4, 5, 6):
        answer = run.take(step, lambda: form(next(velocities)))
        assert type(answer) is type(form(torch.zeros(1)))
        assert sample_of(answer).dtype is torch.bfloat16
        left.append(sample_of(answer))
    assert next(velocities, None) is None, "two steps compute"
    assert torch.equal(left[0], left[1]), "along the only velocity"
    # On the line through both velocities the second step's is 1 + 0.4 / 0.7; the third answer makes that good.
    assert left[2].float().mean().item() == pytest.approx(2.0 + 0.4 / 0.7, rel=1e-2)
