"""Where in a run a call stands: told by the context, by the pipeline's scheduler, or counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from magcache_core import apply_mag_cache, load_profile, schedule
from tests.magcache_core.hooked import Recorder, call_flux

Generate = Callable[..., torch.Tensor]
CONFIG = load_profile("flux.1-dev").config(protected_steps=())


def test_another_step_count_is_resolved_for_each_run(
    pipe: FluxPipeline, generate: Generate, recorder: Recorder
) -> None:
    apply_mag_cache(pipe.transformer, CONFIG)
    for steps in (28, 10, 50, 28, 1):
        generate(steps)
        assert recorder.take() == schedule(CONFIG.resampled(steps))


@pytest.mark.parametrize("steps", [28, 40])
def test_a_hand_written_loop_restarts_on_a_rising_timestep(
    flux: FluxTransformer2DModel, recorder: Recorder, steps: int
) -> None:
    apply_mag_cache(flux, CONFIG)
    for length in (28, 9, steps, 28):
        for i in range(length):
            call_flux(flux, 1 - i / length)
        # Beyond the steps that the settings know, every step computes.
        assert recorder.take() == (schedule(CONFIG) + "C" * 12)[:length]


def test_a_context_that_says_where_it_is_needs_no_counting(flux: FluxTransformer2DModel, recorder: Recorder) -> None:
    apply_mag_cache(flux, CONFIG)
    for i in range(20):
        with flux.cache_context("cond", step_index=i, num_inference_steps=20):
            call_flux(flux, 0.5)
    assert recorder.take() == schedule(CONFIG.resampled(20))
