"""What diffusers tests of its own MagCache, with `apply_mag_cache` and `MagCacheConfig` from here.

The cases are those of diffusers' tests/hooks/test_mag_cache.py: a stack that multiplies by four, so that a computed
step of x gives 4 x and a skipped one x + 3 times the last computed input.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models import ModelMixin

from magcache_core import ConfigError, MagCacheConfig, apply_mag_cache


class DummyBlock(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: object = None) -> torch.Tensor:
        return hidden_states * 2.0


class TupleBlock(torch.nn.Module):
    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states * 2.0, encoder_hidden_states


class DummyTransformer(ModelMixin):  # type: ignore[misc]
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([DummyBlock() for _ in range(blocks)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, encoder_hidden_states=None)
        return hidden_states


class TupleTransformer(ModelMixin):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([TupleBlock()])

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.transformer_blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states, encoder_hidden_states


@pytest.fixture(autouse=True)
def known_blocks() -> Iterator[None]:
    TransformerBlockRegistry.register(DummyBlock, TransformerBlockMetadata())
    TransformerBlockRegistry.register(
        TupleBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
    )
    yield
    del TransformerBlockRegistry._registry[DummyBlock], TransformerBlockRegistry._registry[TupleBlock]


def two_steps(**changes: object) -> MagCacheConfig:
    settings: dict[str, object] = {
        "threshold": 100.0,
        "num_inference_steps": 2,
        "retention_ratio": 0.0,
        "mag_ratios": np.array([1.0, 1.0]),
    }
    return MagCacheConfig(**(settings | changes))  # type: ignore[arg-type]


def value(number: float) -> torch.Tensor:
    return torch.tensor([[[number]]])


def applied(model: ModelMixin, config: MagCacheConfig) -> ModelMixin:
    apply_mag_cache(model, config)
    _set_cache_context(model, CacheContext("test_context"))
    return model


def test_ratios_are_required() -> None:
    with pytest.raises(ValueError, match="mag_ratios"):
        apply_mag_cache(DummyTransformer(), MagCacheConfig(num_inference_steps=10, calibrate=False))


def test_a_step_within_the_threshold_is_skipped() -> None:
    model = applied(DummyTransformer(), two_steps())
    assert model(value(10.0)) == value(40.0)
    assert model(value(11.0)) == value(41.0)


def test_retention_computes() -> None:
    model = applied(DummyTransformer(), two_steps(retention_ratio=1.0))
    model(value(10.0))
    assert model(value(11.0)) == value(44.0)


def test_tuple_outputs_and_a_single_block() -> None:
    model = applied(TupleTransformer(), two_steps())
    hidden, context = model(value(10.0), value(1.0))
    assert (hidden, context) == (value(20.0), value(1.0))
    hidden, context = model(value(11.0), value(1.0))
    assert (hidden, context) == (value(21.0), value(1.0))


def test_the_run_ends_after_its_steps() -> None:
    model = applied(DummyTransformer(), two_steps())
    model(value(1.0))
    model(value(1.0))
    assert model(value(2.0)) == value(8.0)


def test_calibration_records_the_ratios() -> None:
    def measured(model: ModelMixin) -> list[float]:
        hook = model._diffusers_hook.get_hook("mag_cache_leader_block_hook")
        return hook.state_manager.get_state().statistics.norm_ratios  # type: ignore[no-any-return]

    model = applied(DummyTransformer(), MagCacheConfig(num_inference_steps=2, calibrate=True))
    model(value(10.0))
    assert measured(model) == [1.0]
    assert model(value(10.0)) == value(40.0)
    assert measured(model) == []


def test_diffusers_own_switches_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """``enable_cache`` picks ours up by its name, ``disable_cache`` and ``_reset_stateful_cache`` find our hooks."""
    import diffusers.hooks
    from diffusers.models.cache_utils import CacheMixin

    class Cached(DummyTransformer, CacheMixin):  # type: ignore[misc]
        pass

    monkeypatch.setattr(diffusers.hooks, "MagCacheConfig", MagCacheConfig)
    monkeypatch.setattr(diffusers.hooks, "apply_mag_cache", apply_mag_cache)
    model = Cached()
    model.enable_cache(two_steps())
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(two_steps())
    with model.cache_context("cond"):
        model(value(10.0))
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        assert model(value(11.0)) == value(44.0)
        assert model(value(12.0)) == value(45.0)
    model.disable_cache()
    assert not model._diffusers_hook.hooks
    assert model(value(3.0)) == value(12.0)


def test_extrapolating_needs_noise_levels() -> None:
    config = two_steps(num_inference_steps=3, retention_ratio=0.5, mag_ratios=[1.0] * 3)
    model = DummyTransformer()
    apply_mag_cache(model, config, reuse="linear")
    model(value(1.0))
    model(value(2.0))
    with pytest.raises(ConfigError, match="sigmas"):
        model(value(3.0))
    apply_mag_cache(model, config, reuse="linear", sigmas=[1.0, 0.5, 0.25])
    model(value(1.0))
    model(value(2.0))
    # Residuals 3 and 6 at sigma 1 and 0.5 extrapolate to 7.5 at 0.25.
    assert model(value(3.0)) == value(10.5)
