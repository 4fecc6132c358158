"""Fused projections give what diffusers' blocks give, and a rank's are made of its own slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from app.engine import fp8
from app.engine.attention import positions, use_positions
from app.engine.engine import Engine
from app.engine.fused import FUSED, PARTS, fuse
from app.engine.loading import load_transformer, meta_transformer
from app.engine.parallel import TensorParallelGroup, planned_linears
from app.engine.sequence import SequenceParallelGroup
from app.engine.tuning import Tuning
from magcache_core import get_strategy
from tests.engine.models import TinyModel, plans, run
from tests.local_group import MODEL, job

CPU = torch.device("cpu")
SEPARATE = {part for parts in PARTS.values() for part in parts}


@pytest.fixture(scope="module", params=["flux.1-dev", "flux.2-klein-4b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(request.param, tmp_path_factory.mktemp("fused") / "model")


def blocks(transformer: Any, place: Callable[[Any], Any]) -> torch.Tensor:
    """What the block stack makes of 16 image and 4 text tokens, twice; ``place`` forms the positions."""
    config = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    drawn = torch.Generator().manual_seed(3)
    hidden, context, temb = (torch.randn(2, *shape, generator=drawn) for shape in ((16, dim), (4, dim), (dim,)))
    rotary = transformer.pos_embed(torch.arange(20.0)[:, None].expand(-1, len(config.axes_dims_rope)))
    return get_strategy(transformer).blocks(transformer, hidden, context, temb, place(rotary))


@torch.inference_mode()
def test_fused_blocks_are_diffusers(model: TinyModel) -> None:
    transformer = model.pipeline.transformer
    expected = blocks(transformer, lambda rotary: rotary)
    fuse(transformer)
    use_positions(transformer, SequenceParallelGroup(), complex_rotary=False)
    made = blocks(transformer, lambda rotary: positions(transformer, rotary, ()))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert not any(name.endswith(tuple(SEPARATE)) for name, _ in transformer.named_modules())


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_has_its_slice_of_every_part(size: int) -> None:
    theirs = FluxTransformer2DModel.from_pretrained(MODEL, subfolder="transformer", dtype=torch.float32)
    fused = 0
    for rank in range(size):
        shard = load_transformer(MODEL, TensorParallelGroup(rank, size), CPU, torch.float32)
        for name, slot in fuse(meta_transformer(MODEL / "transformer")).items():
            whole = theirs.get_parameter(name)
            own = whole.chunk(size)[rank]
            begin, end = slot.begin // size, slot.end // size
            assert torch.equal(shard.get_parameter(slot.parameter)[begin:end], own), name
            fused += 1
    assert fused > 0


def test_all_of_the_plan_is_fused_or_left_as_it_was(model: TinyModel) -> None:
    names = {name.rpartition(".")[2] for name, _ in planned_linears(Engine(model.folder).transformer)}
    assert names & set(FUSED)
    assert not names & {part.rpartition(".")[2] for part in SEPARATE}


def test_in_8_bits_an_input_is_rounded_once(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.folder, tuning=Tuning(quantization="fp8"))
    rounded: list[torch.Size] = []
    to_float8 = fp8.to_float8
    monkeypatch.setattr(fp8, "to_float8", lambda matrix: (rounded.append(matrix.shape), to_float8(matrix))[1])
    asked = job("a/0", size=(64, 64), steps=1)
    run(engine, plans(asked), model.conditioning(asked))
    blocks = engine.transformer
    # In a double block for either stream: queries to values, output, MLP in, MLP out. In a single one two in all.
    assert len(rounded) == 2 * 4 * len(blocks.transformer_blocks) + 2 * len(blocks.single_transformer_blocks)
