"""What a reader of vLLM-Omni's MagCache guide types runs here with the import lines changed.

https://github.com/vllm-project/vllm-omni/pull/1287 and its strategy module say how a model is added there.
"""

from __future__ import annotations

import ast
import logging

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata
from torch import nn

from magcache_core import (
    ConfigError,
    MagCacheConfig,
    MagCacheStrategy,
    apply_mag_cache,
    register_strategy,
    schedule,
    strategies,
)
from magcache_core.taps import BlockTaps

STEPS = 28
RATIOS = [1.0, 1.2, 1.1, *[1.01] * 25]


class SingleBlock(nn.Module):
    """One stream in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden_states * 1.5


class DoubleBlock(SingleBlock):
    """Two streams in, (text, image) out."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        self.calls += 1
        return encoder_hidden_states + 1, hidden_states * 1.5


class MyTransformer2DModel(nn.Module):
    """Two blocks of a class that no library describes."""

    def __init__(self, block: type[SingleBlock]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([block(), block()])
        self.double = block is DoubleBlock
        self.text = torch.zeros(1, 2, 3)

    def forward(self, hidden_states: torch.Tensor, timestep: float) -> torch.Tensor:
        text = torch.zeros(1, 2, 3)
        for block in self.transformer_blocks:
            if self.double:
                text, hidden_states = block(hidden_states, text)
            else:
                hidden_states = block(hidden_states)
        self.text = text
        return hidden_states

    @property
    def marks(self) -> list[int]:
        return [block.calls for block in self.transformer_blocks]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))


def run(model: MyTransformer2DModel, steps: int = STEPS) -> str:
    """Denoise, and say which steps computed."""
    made = ""
    for step in range(steps):
        before = model.marks[0]
        model(torch.full((1, 4, 3), 2.0 + step), 1.0 - step / steps)
        made += "C" if model.marks[0] > before else "."
    assert len(set(model.marks)) == 1, "all blocks run, or none"
    return made


class RatiosOnly(MagCacheStrategy):
    @property
    def mag_ratios(self) -> torch.Tensor:
        return torch.tensor(RATIOS)


@pytest.mark.parametrize("block", [SingleBlock, DoubleBlock])
def test_a_strategy_with_ratios_alone_is_enough(block: type[SingleBlock]) -> None:
    register_strategy("MyTransformer2DModel", RatiosOnly())
    model = MyTransformer2DModel(block)
    apply_mag_cache(model, MagCacheConfig(num_inference_steps=STEPS))
    made = run(model)
    assert made == schedule(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=RATIOS))
    assert "." in made


def test_the_strategys_ratios_are_only_a_default() -> None:
    register_strategy("MyTransformer2DModel", RatiosOnly())
    model = MyTransformer2DModel(SingleBlock)
    apply_mag_cache(model, MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS))
    assert run(model) == schedule(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS))


def test_without_any_ratios_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"mag_ratios=None.*calibrate=True"):
        apply_mag_cache(MyTransformer2DModel(SingleBlock), MagCacheConfig(num_inference_steps=STEPS))
    with pytest.raises(ConfigError, match=r"mag_ratios=None.*calibrate=True"):
        schedule(MagCacheConfig(num_inference_steps=STEPS))


@pytest.mark.parametrize("block", [SingleBlock, DoubleBlock])
def test_calibration_needs_no_description_of_the_blocks(
    block: type[SingleBlock], caplog: pytest.LogCaptureFixture
) -> None:
    model = MyTransformer2DModel(block)
    apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    with caplog.at_level(logging.WARNING):
        assert run(model) == "C" * STEPS
    logged = dict(message.split(": ", 1) for message in caplog.messages)
    lists = {name.rpartition(" ")[2]: ast.literal_eval(text) for name, text in logged.items()}
    assert lists.keys() == {"norm_ratios", "norm_stds", "cos_dises"}
    assert all(len(values) == STEPS for values in lists.values())
    # Each step's input, and so its residual, grows in proportion.
    assert lists["norm_ratios"][1:3] == pytest.approx([3 / 2, 4 / 3], abs=1e-5)
    # What was logged can be pasted.
    apply_mag_cache(model, MagCacheConfig(mag_ratios=lists["norm_ratios"], num_inference_steps=STEPS))


class BothStreams(MagCacheStrategy):
    """Everything that the guide lets a strategy override."""

    @property
    def mag_ratios(self) -> torch.Tensor:
        return torch.ones(STEPS)

    def register_block_metadata(self, block_class: type) -> TransformerBlockMetadata | None:
        return TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)

    def compute_residual(
        self, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor], head_input: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(output, tuple)
        return output[1] - head_input, output[0]

    def apply_residual_tuple(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        residual: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + residual[0], encoder_hidden_states + 10 * residual[1]


def test_residuals_of_both_streams() -> None:
    register_strategy("MyTransformer2DModel", BothStreams())
    model = MyTransformer2DModel(DoubleBlock)
    apply_mag_cache(model, MagCacheConfig(1.0, 5, 0.0, num_inference_steps=3))
    first, second = torch.full((1, 4, 3), 2.0), torch.full((1, 4, 3), 5.0)
    assert torch.equal(model(first, 1.0), first * 2.25)
    assert torch.equal(model.text, torch.full((1, 2, 3), 2.0))
    assert torch.equal(model(second, 0.5), second + first * 1.25)
    assert torch.equal(model.text, torch.full((1, 2, 3), 20.0)), "what was stored, ten times"


def test_both_streams_are_calibrated_together() -> None:
    register_strategy("MyTransformer2DModel", BothStreams())
    model = MyTransformer2DModel(DoubleBlock)
    apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=3))
    assert run(model, 3) == "CCC"


class Overriding(RatiosOnly):
    """A residual of one stream, computed and applied in ways of its own."""

    def compute_residual(self, output: torch.Tensor, head_input: torch.Tensor) -> torch.Tensor:
        return (output - head_input) * 2

    def apply_residual(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden + residual / 4


def test_residuals_of_one_stream() -> None:
    register_strategy("MyTransformer2DModel", Overriding())
    model = MyTransformer2DModel(SingleBlock)
    apply_mag_cache(model, MagCacheConfig(10.0, 5, 0.0, num_inference_steps=3))
    first, second = torch.full((1, 4, 3), 2.0), torch.full((1, 4, 3), 5.0)
    model(first, 1.0)
    assert torch.equal(model(second, 0.5), second + first * 1.25 / 2)


@pytest.mark.parametrize("reuse", ["scaled", "linear"])
def test_residuals_of_both_streams_are_weighted_apart(reuse: str) -> None:
    register_strategy("MyTransformer2DModel", BothStreams())
    model = MyTransformer2DModel(DoubleBlock)
    config = MagCacheConfig(1.0, 5, 0.5, num_inference_steps=3, mag_ratios=[1.0, 1.0, 0.5])
    apply_mag_cache(model, config, reuse, sigmas=[1.0, 0.5, 0.25])
    first, second, third = (torch.full((1, 4, 3), value) for value in (2.0, 4.0, 8.0))
    model(first, 1.0)
    model(second, 0.5)
    # One ratio of 0.5 since the second step; or from noise levels 1 and 0.5 on to 0.25.
    weights = (0.5, 0.0) if reuse == "scaled" else (1.5, -0.5)
    assert torch.equal(model(third, 0.25), third + weights[0] * second * 1.25 + weights[1] * first * 1.25)
    assert torch.equal(model.text, torch.full((1, 2, 3), 20.0 * sum(weights)))


class ImageFirst(SingleBlock):
    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states * 2, encoder_hidden_states


class Described(RatiosOnly):
    def register_block_metadata(self, block_class: type) -> TransformerBlockMetadata | None:
        return TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)


def test_a_described_block_is_not_judged() -> None:
    taps = BlockTaps(nn.ModuleDict({"blocks": nn.ModuleList([ImageFirst()])}), Described())
    block = taps._lists["blocks"][0]
    image, text = torch.full((1, 4, 3), 2.0), torch.ones(1, 2, 3)
    taps.run(lambda: block(image, text))
    assert torch.equal(taps.residual, image)
    streams = taps.run(lambda: block(image, text), image)
    assert torch.equal(streams[0], image * 2)
    assert torch.equal(streams[1], text)


class Triple(SingleBlock):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return encoder_hidden_states, hidden_states, hidden_states


class PairWithoutText(SingleBlock):
    def forward(self, hidden_states: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, hidden_states


@pytest.mark.parametrize("kind", [Triple, PairWithoutText])
def test_a_block_that_cannot_be_judged_says_what_to_do(kind: type[SingleBlock]) -> None:
    taps = BlockTaps(nn.ModuleDict({"blocks": nn.ModuleList([kind()])}), RatiosOnly())
    with pytest.raises(LookupError, match=rf"{kind.__name__}.*register_block_metadata"):
        taps.run(lambda: taps._lists["blocks"][0](torch.ones(1, 4, 3), torch.ones(1, 2, 3)))
