"""The hook path where velocities are predicted and corrected, against the slow oracle on the same pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from magcache_core import (
    VELOCITY_MODES,
    ConfigError,
    Plan,
    apply_mag_cache,
    load_profile,
    remove_mag_cache,
    schedule,
)
from tests.magcache_core.hooked import call_flux
from tests.magcache_core.slow_corrector import SlowRun
from tests.magcache_core.slow_least_squares import SlowLeastSquares, products

Generate = Callable[..., torch.Tensor]
SCHEDULE = "CC..C...C."


@pytest.fixture
def ran(flux: FluxTransformer2DModel) -> list[int]:
    """Grows with each run of the transformer's blocks."""
    calls: list[int] = []
    flux.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def by_hand(pipe: FluxPipeline, sigmas: list[float], marks: str, mode: str, branches: int) -> Callable[..., Any]:
    """A forward that answers so that the pipeline's Euler steps are the slow loop's."""
    forward = pipe.transformer.forward
    runs = [
        SlowLeastSquares(sigmas, marks) if mode == "least_squares" else SlowRun(sigmas, marks, mode == "integrated")
        for _ in range(branches)
    ]

    def answer(**arguments: Any) -> tuple[torch.Tensor]:
        run = min(runs, key=lambda one: one.step)
        step, latents = run.step, arguments["hidden_states"]
        after = run.advance(latents, lambda: forward(**arguments)[0])
        return (((after - latents.double()) / (sigmas[step + 1] - sigmas[step])).float(),)

    return answer


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("mode", VELOCITY_MODES)
def test_equals_the_slow_loop(pipe: FluxPipeline, generate: Generate, ran: list[int], mode: str, cfg: float) -> None:
    uncached = generate(10, cfg)
    branches = 2 if cfg > 1 else 1
    ran.clear()
    known = products(len(SCHEDULE)) if mode == "least_squares" else ()
    apply_mag_cache(pipe.transformer, Plan(SCHEDULE, mode, products=known))
    hooked = generate(10, cfg)
    assert len(ran) == branches * SCHEDULE.count("C")
    torch.testing.assert_close(generate(10, cfg), hooked)  # a run leaves nothing to the next
    remove_mag_cache(pipe.transformer)
    pipe.transformer.forward = by_hand(pipe, pipe.scheduler.sigmas.tolist(), SCHEDULE, mode, branches)
    expected = generate(10, cfg)
    torch.testing.assert_close(hooked, expected, rtol=1e-4, atol=1e-4)
    assert (hooked - uncached).norm() > 20 * (hooked - expected).norm()


def test_the_threshold_rule_can_be_corrected(pipe: FluxPipeline, generate: Generate, ran: list[int]) -> None:
    config = load_profile("flux.1-dev").config(12)
    apply_mag_cache(pipe.transformer, config, reuse="corrected")
    hooked = generate(12)
    assert len(ran) == schedule(config).count("C") < 12
    remove_mag_cache(pipe.transformer)
    apply_mag_cache(pipe.transformer, Plan(schedule(config), "corrected"))
    assert torch.equal(generate(12), hooked)


def test_an_aborted_run_leaves_nothing_to_the_next(pipe: FluxPipeline, generate: Generate) -> None:
    apply_mag_cache(pipe.transformer, Plan(SCHEDULE, "corrected"))
    whole = generate(10)

    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        generate(10, callback_on_step_end=stop)
    assert torch.equal(generate(10), whole)


def test_controlnet_residuals_compute_and_the_run_begins_anew(flux: FluxTransformer2DModel, ran: list[int]) -> None:
    samples = [torch.ones(1, 16, 32)]
    sigmas = [1 - i / 10 for i in range(10)]
    plain = call_flux(flux, sigmas[2], controlnet_block_samples=samples)
    apply_mag_cache(flux, Plan(SCHEDULE, "corrected"), sigmas=sigmas)
    marks = ""
    for i, sigma in enumerate(sigmas):
        before = len(ran)
        made = call_flux(flux, sigma, controlnet_block_samples=samples if i < 3 else None)
        marks += "C" if len(ran) > before else "."
        if i == 2:
            assert torch.equal(made, plain)
    assert marks == "CCCCC...C."  # three with a ControlNet, one to begin with, and then the plan's


def test_noise_levels_of_the_whole_run_are_needed(flux: FluxTransformer2DModel) -> None:
    apply_mag_cache(flux, Plan(SCHEDULE, "corrected"))
    with pytest.raises(ConfigError, match="one per step of the run"):
        call_flux(flux, 1.0)
    apply_mag_cache(flux, Plan(SCHEDULE, "corrected"), sigmas=[1.0, 0.5])
    with pytest.raises(ConfigError, match="one per step of the run"):
        call_flux(flux, 1.0)
