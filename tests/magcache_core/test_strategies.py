"""Strategies: the splits are exact, models can be added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import nn

from magcache_core import (
    BlockMetadata,
    MagCacheConfig,
    MagCacheStrategy,
    ResidualError,
    apply_mag_cache,
    get_strategy,
    register_strategy,
    registered_strategies,
    strategies,
)
from tests.magcache_core.tiny_flux import POOLED_DIM, TEXT_DIM, TEXT_TOKENS, make_flux

ROWS = 3
TIMESTEPS = torch.tensor([0.9, 0.5, 0.1])
GUIDANCE = torch.tensor([3.5, 1.0, 7.0])


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_split_equals_forward(guided: bool, dtype: torch.dtype) -> None:
    """Rows at different steps, with different guidance, in one batch."""
    model = make_flux(guidance_embeds=guided).to(dtype)
    strategy = get_strategy(model)
    latents = torch.randn(ROWS, 9, 16, dtype=dtype)
    text = torch.randn(ROWS, TEXT_TOKENS, TEXT_DIM, dtype=dtype)
    pooled = torch.randn(ROWS, POOLED_DIM, dtype=dtype)
    guidance = GUIDANCE if guided else None
    image_ids = torch.zeros(9, 3)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(9) // 3, torch.arange(9) % 3
    text_ids = torch.zeros(TEXT_TOKENS, 3)
    with torch.no_grad():
        expected = model(latents, text, pooled, TIMESTEPS, image_ids, text_ids, guidance).sample
        hidden, temb = strategy.embed(model, latents, TIMESTEPS, guidance, pooled)
        context = strategy.context(model, text)
        output = strategy.blocks(model, hidden, context, temb, model.pos_embed(torch.cat([text_ids, image_ids])))
        assert torch.equal(strategy.project(model, output, strategy.output_modulation(model, temb)), expected)


def test_flux2_split_equals_forward() -> None:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_DIM, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    ).eval()  # fmt: skip
    strategy = get_strategy(model)
    latents, text = torch.randn(ROWS, 9, 16), torch.randn(ROWS, TEXT_TOKENS, TEXT_DIM)
    image_ids, text_ids = torch.zeros(9, 4), torch.zeros(TEXT_TOKENS, 4)
    image_ids[:, 1] = torch.arange(9)
    with torch.no_grad():
        expected = model(latents, text, TIMESTEPS, image_ids, text_ids, GUIDANCE).sample
        hidden, temb = strategy.embed(model, latents, TIMESTEPS, GUIDANCE, None)
        rotary = tuple(
            torch.cat(pair) for pair in zip(model.pos_embed(text_ids), model.pos_embed(image_ids), strict=True)
        )
        output = strategy.blocks(model, hidden, strategy.context(model, text), temb, rotary)
        assert torch.equal(strategy.project(model, output, strategy.output_modulation(model, temb)), expected)


def test_lookup() -> None:
    flux = get_strategy("FluxTransformer2DModel")
    assert get_strategy(FluxTransformer2DModel) is flux
    assert get_strategy(make_flux()) is flux
    assert flux.mag_ratios is not None
    assert flux.mag_ratios[1] == 1.21094
    assert get_strategy("QwenImageTransformer2DModel").mag_ratios is None
    with pytest.raises(LookupError, match=r"no MagCache strategy for UNet.*Flux2Transformer2DModel.*Qwen"):
        get_strategy("UNet2DConditionModel")
    with pytest.raises(TypeError, match="QwenImageStrategy has no embed/blocks/project split"):
        get_strategy("QwenImageTransformer2DModel").context(None, torch.zeros(1))


def test_residuals_must_fit() -> None:
    strategy = MagCacheStrategy()
    hidden, context = torch.ones(2, 4, 3), torch.ones(2, 5, 3)
    assert torch.equal(strategy.compute_residual(hidden * 3, hidden), hidden * 2)
    assert torch.equal(strategy.apply_residual(hidden, hidden), hidden * 2)
    both = strategy.apply_residual_tuple(hidden, context, (hidden, context))
    assert torch.equal(both[0], hidden * 2)
    assert torch.equal(both[1], context * 2)
    for wrong in (torch.ones(2, 4, 2), hidden.double(), hidden.to("meta")):
        with pytest.raises(ResidualError, match="does not fit"):
            strategy.apply_residual(hidden, wrong)
        with pytest.raises(ResidualError, match="does not fit"):
            strategy.compute_residual(wrong, hidden)
    with pytest.raises(ResidualError, match=r"\(2, 4, 3\).*\(2, 5, 3\)"):
        strategy.apply_residual_tuple(hidden, context, (hidden, hidden))


class MyBlock(nn.Module):
    """Takes and returns (text, image), under names of its own."""

    def forward(self, words: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return words + 1, image * 3


class MyTransformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MyBlock(), MyBlock()])
        self.calls = 0

    def forward(self, image: torch.Tensor, timestep: float) -> torch.Tensor:
        words = torch.zeros(1, 2, 1)
        for layer in self.layers:
            words, image = layer(words, image)
        return image


class MyStrategy(MagCacheStrategy):
    """The example of docs/calibration.md."""

    def register_block_metadata(self, block_class: type) -> BlockMetadata | None:
        return BlockMetadata(hidden_index=1, context_index=0, hidden_name="image", context_name="words")


def test_a_model_is_added_by_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))
    register_strategy("MyTransformer2DModel", MyStrategy())
    assert "MyTransformer2DModel" in registered_strategies()
    model: Any = MyTransformer2DModel()
    apply_mag_cache(model, MagCacheConfig(1.0, 5, 0.0, num_inference_steps=2, mag_ratios=[1.0, 1.0]))
    first, second = torch.full((1, 4, 1), 2.0), torch.full((1, 4, 1), 5.0)
    assert torch.equal(model(first, 1.0), first * 9)
    assert torch.equal(model(second, 0.5), second + first * 8)


def test_an_unknown_block_names_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"MyBlock.*register_block_metadata"):
        apply_mag_cache(MyTransformer2DModel(), MagCacheConfig(mag_ratios=[1.0]))
    with pytest.raises(ValueError, match="no transformer blocks"):
        apply_mag_cache(nn.Linear(1, 1), MagCacheConfig(mag_ratios=[1.0]))
