"""Noise schedules against diffusers' pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from app.engine.geometry import Geometry
from app.engine.layouts import Flux2Layout
from app.engine.sampling import FlowMatchSampler
from tests.local_group import MODEL


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 96), (64, 256)])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_sigmas_are_those_of_the_pipeline(pipeline: FluxPipeline, width: int, height: int, steps: int) -> None:
    pipeline(
        "", width=width, height=height, num_inference_steps=steps, max_sequence_length=32, output_type="latent",
        callback_on_step_end=_stop_after_first,
    )  # fmt: skip
    pipeline._interrupt = False
    ours = FlowMatchSampler(MODEL).sigmas(steps, Geometry.of(width, height).tokens)
    torch.testing.assert_close(ours, pipeline.scheduler.sigmas, rtol=0, atol=0)


def _stop_after_first(pipeline: FluxPipeline, *_: object) -> dict[str, object]:
    pipeline._interrupt = True
    return {}


@pytest.mark.parametrize("tokens", [64, 256, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 200])
def test_flux2_shifts_as_its_pipeline_does(tokens: int, steps: int) -> None:
    assert Flux2Layout().shift(None, tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
