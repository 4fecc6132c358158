"""The hook path on plain diffusers transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel, QwenImageTransformer2DModel

from magcache_core import (
    ConfigError,
    MagCacheConfig,
    Plan,
    ResidualError,
    apply_mag_cache,
    decisions,
    get_strategy,
    load_profile,
    remove_mag_cache,
    schedule,
)
from magcache_core.hooks import HEAD_HOOK
from magcache_core.taps import BlockTaps
from tests.magcache_core.hooked import Recorder, call_flux

Generate = Callable[..., torch.Tensor]
CONFIG = load_profile("flux.1-dev").config(protected_steps=())


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_equals_diffusers_own_hooks(pipe: FluxPipeline, generate: Generate, cfg: float) -> None:
    pipe.transformer.enable_cache(
        diffusers.MagCacheConfig(0.24, 5, 0.1, num_inference_steps=28, mag_ratios=list(CONFIG.mag_ratios))
    )
    theirs = generate(28, cfg)
    pipe.transformer.disable_cache()
    uncached = generate(28, cfg)
    apply_mag_cache(pipe.transformer, CONFIG)
    ours = generate(28, cfg)
    assert not torch.allclose(ours, uncached)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    remove_mag_cache(pipe.transformer)
    assert torch.equal(generate(28, cfg), uncached)


def test_an_aborted_run_leaves_nothing_to_the_next(pipe: FluxPipeline, generate: Generate, recorder: Recorder) -> None:
    apply_mag_cache(pipe.transformer, CONFIG)
    whole = generate(28)
    recorder.take()

    def abort(pipe: FluxPipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 6:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        generate(28, callback_on_step_end=abort)
    recorder.take()
    assert torch.equal(generate(28), whole)
    assert recorder.take() == schedule(CONFIG)


def test_each_context_has_its_own_state(pipe: FluxPipeline, generate: Generate, recorder: Recorder) -> None:
    apply_mag_cache(pipe.transformer, CONFIG)
    generate(28, true_cfg_scale=3.0)
    marks = recorder.take()
    assert marks[0::2] == marks[1::2] == schedule(CONFIG)


def test_controlnet_residuals_compute(flux: FluxTransformer2DModel, recorder: Recorder) -> None:
    samples = [torch.ones(1, 16, 32)]
    plain = [call_flux(flux, 1 - i / 28, controlnet_block_samples=samples) for i in range(28)]
    apply_mag_cache(flux, CONFIG)
    for i in range(28):
        assert torch.equal(call_flux(flux, 1 - i / 28, controlnet_block_samples=samples), plain[i])
    assert recorder.take() == "C" * 28
    # Guidance by a ControlNet often ends early: caching starts once there is a residual without it.
    for i in range(28):
        call_flux(flux, 1 - i / 28, controlnet_block_samples=samples if i < 8 else None)
    assert recorder.take().startswith("C" * 9 + ".")


@pytest.mark.parametrize("reuse", ["residual", "scaled", "linear"])
def test_reuse_modes_add_the_weighted_residuals(pipe: FluxPipeline, generate: Generate, reuse: str) -> None:
    """The hooks' images equal a loop that applies `decisions` by hand."""
    apply_mag_cache(pipe.transformer, CONFIG, reuse=reuse)
    hooked = generate(28)
    remove_mag_cache(pipe.transformer)
    by_hand = iter(decisions(CONFIG, pipe.scheduler.sigmas.tolist(), reuse))
    taps = BlockTaps(pipe.transformer, get_strategy(pipe.transformer))
    residuals: list[torch.Tensor] = []
    forward = pipe.transformer.forward

    def step(**arguments: Any) -> Any:
        decision = next(by_hand)
        if decision.compute:
            output = taps.run(lambda: forward(**arguments))
            residuals.insert(0, taps.residual)
            return output
        total = sum(w * r for w, r in zip(decision.weights, residuals, strict=False))
        return taps.run(lambda: forward(**arguments), total)  # type: ignore[arg-type]

    pipe.transformer.forward = step
    torch.testing.assert_close(hooked, generate(28), rtol=1e-4, atol=1e-4)


def test_a_plan_is_followed(pipe: FluxPipeline, generate: Generate, recorder: Recorder) -> None:
    plan = Plan("CC..C...C.", reuse="linear")
    apply_mag_cache(pipe.transformer, plan)
    generate(10)
    assert recorder.take() == plan.schedule
    with pytest.raises(ConfigError, match="planned for the run's 12 steps"):
        generate(12)


def test_fitted_weights_are_used_while_the_run_follows_the_plan(flux: FluxTransformer2DModel) -> None:
    plan = Plan("CC.", "fitted", weights=((), (), (0.25, 0.5)))
    taps = BlockTaps(flux, get_strategy(flux))
    sigmas = (1.0, 0.8, 0.5)
    residuals = []
    for sigma in sigmas[:2]:
        taps.run(lambda sigma=sigma: call_flux(flux, sigma))  # type: ignore[misc]
        residuals.append(taps.residual)
    mixed = taps.run(lambda: call_flux(flux, 0.5), 0.25 * residuals[1] + 0.5 * residuals[0])
    plain = taps.run(lambda: call_flux(flux, 0.5), residuals[1])
    apply_mag_cache(flux, plan)
    torch.testing.assert_close([call_flux(flux, sigma) for sigma in sigmas][2], mixed)
    # With ControlNet residuals at the first step there is one residual where the fit wants two.
    samples = [torch.ones(1, 16, 32)]
    controlled = [call_flux(flux, s, controlnet_block_samples=samples if s == 1.0 else None) for s in sigmas]
    torch.testing.assert_close(controlled[2], plain)


def make_flux2() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    ).eval()  # fmt: skip


def make_qwen() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def flux2_inputs() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(16, 4)
    ids[:, 1] = torch.arange(16)
    fixed = {
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "guidance": torch.tensor([4.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 4),
    }
    for sigma in (1.0, 0.9):
        latents = torch.randn(1, 16, 16, generator=generator)
        yield fixed | {"hidden_states": latents, "timestep": torch.tensor([sigma])}


def qwen_inputs() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 5, 24, generator=generator)
    for sigma in (1.0, 0.9):
        yield {
            "hidden_states": torch.randn(1, 16, 16, generator=generator),
            "encoder_hidden_states": context,
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
            "timestep": torch.tensor([sigma]),
            "img_shapes": [[(1, 4, 4)]],
        }


@pytest.mark.parametrize(("make", "inputs"), [(make_flux2, flux2_inputs), (make_qwen, qwen_inputs)])
def test_a_skipped_step_adds_the_image_tokens_residual(make: Any, inputs: Any) -> None:
    """Against recomputation: the skipped step's output is the projection of its own input plus the stored residual."""
    model = make()
    always = MagCacheConfig(1e9, 5, 0.0, num_inference_steps=2, mag_ratios=[1.0, 1.0])
    first, second = inputs()
    with torch.no_grad():
        taps = BlockTaps(model, get_strategy(model))
        taps.run(lambda: model(**first))
        stored = taps.residual
        full = model(**second).sample
        expected = taps.run(lambda: model(**second), stored).sample
        bypassed = taps.run(lambda: model(**second), torch.zeros_like(stored)).sample
        apply_mag_cache(model, always)
        model(**first)
        skipped = model(**second).sample
    assert stored.shape == (1, 16, 32)
    assert torch.equal(skipped, expected)
    assert not torch.allclose(skipped, full, atol=1e-4)
    assert not torch.allclose(skipped, bypassed, atol=1e-4)


def test_flux2_skipped_step_against_the_split() -> None:
    """The same for FLUX.2 through the strategy's own parts, which share no code with the hooks."""
    model = make_flux2()
    strategy = get_strategy(model)
    first, second = flux2_inputs()
    with torch.no_grad():
        rotary = tuple(
            torch.cat(pair)
            for pair in zip(model.pos_embed(first["txt_ids"]), model.pos_embed(first["img_ids"]), strict=True)
        )
        hidden, temb = strategy.embed(model, first["hidden_states"], first["timestep"], first["guidance"], None)
        context = strategy.context(model, first["encoder_hidden_states"])
        residual = strategy.blocks(model, hidden, context, temb, rotary) - hidden
        hidden, temb = strategy.embed(model, second["hidden_states"], second["timestep"], second["guidance"], None)
        expected = strategy.project(model, hidden + residual, strategy.output_modulation(model, temb))
        apply_mag_cache(model, MagCacheConfig(1e9, 5, 0.0, num_inference_steps=2, mag_ratios=[1.0, 1.0]))
        model(**first)
        torch.testing.assert_close(model(**second).sample, expected)


def test_a_batch_that_changes_in_a_run_raises(flux: FluxTransformer2DModel) -> None:
    apply_mag_cache(flux, CONFIG)
    taps_hook = flux._diffusers_hook.get_hook(HEAD_HOOK)
    for i in range(3):
        call_flux(flux, 1 - i / 28)
    state = taps_hook.state_manager._state_cache["inference"]
    state.residuals = [(sigma, residual.repeat(2, 1, 1)) for sigma, residual in state.residuals]
    with pytest.raises(ResidualError, match="does not fit"):
        call_flux(flux, 1 - 3 / 28)


def test_compiled_blocks_stay_one_graph(flux: FluxTransformer2DModel, recorder: Recorder) -> None:
    """``fullgraph=True`` refuses a graph break; the hooks stand outside of every block."""
    apply_mag_cache(flux, CONFIG)
    plain = [call_flux(flux, 1 - i / 28) for i in range(8)]
    remove_mag_cache(flux)
    torch.compiler.reset()
    flux.compile_repeated_blocks(fullgraph=True, backend="eager")
    apply_mag_cache(flux, CONFIG)
    recorder.take()
    for i in range(8):
        torch.testing.assert_close(call_flux(flux, 1 - i / 28), plain[i], rtol=1e-4, atol=1e-5)
    assert recorder.take() == schedule(CONFIG)[:8]


def test_calibration_measures_and_logs(
    pipe: FluxPipeline, generate: Generate, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="magcache_core")
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=6))
    generate(6)
    assert recorder.take() == "C" * 6
    logged = {record.args[0]: record.args[1] for record in caplog.records}  # type: ignore[index,call-overload]
    assert set(logged) == {"norm_ratios", "norm_stds", "cos_dises"}
    assert len(logged["norm_ratios"]) == 6
    assert logged["norm_ratios"][0] == 1.0
