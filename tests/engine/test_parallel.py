"""Two and three ranks, real processes and real gloo collectives, equal one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from app.engine.engine import Engine
from app.engine.fused import fuse
from app.engine.geometry import Geometry
from app.engine.loading import load_transformer, meta_transformer
from app.engine.parallel import TensorParallelGroup, shard_specs
from app.engine.process_groups import RankGroups
from tests.engine.mixed import mixed
from tests.local_group import MODEL, execute
from tests.ranks import on_ranks, relative_error

CPU = torch.device("cpu")


def _execute_mix(groups: RankGroups) -> dict[str, torch.Tensor]:
    return execute(Engine(MODEL, groups), *mixed())


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_equals_whole(size: int, tmp_path: Path) -> None:
    sharded = on_ranks((size, 1, 1), tmp_path, _execute_mix)
    whole = _execute_mix(RankGroups())
    assert sharded.keys() == whole.keys() == {"a/0", "b/0", "c/0", "d/0"}
    for row_id, expected in whole.items():
        assert relative_error(sharded[row_id], expected) <= 1e-5


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_holds_its_slices_only(size: int) -> None:
    whole = load_transformer(MODEL, TensorParallelGroup(), CPU, torch.float32)
    checkpoint = meta_transformer(MODEL / "transformer")
    specs = shard_specs(checkpoint, size)
    slots = fuse(checkpoint)
    sharded_names = {slots[name].parameter if name in slots else name for name in specs}
    bias = {name for name, spec in specs.items() if spec.dim is None}
    total = {name: value.numel() for name, value in whole.named_parameters()}
    ranks = [load_transformer(MODEL, TensorParallelGroup(rank, size), CPU, torch.float32) for rank in range(size)]
    for name, count in total.items():
        held = [rank.get_parameter(name).numel() for rank in ranks]
        expected = count // size if name in sharded_names - bias else count
        assert held == [expected] * size, name


def test_a_double_block_sums_three_times_and_a_single_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[torch.Size] = []

    def count(group: TensorParallelGroup, partial: torch.Tensor) -> torch.Tensor:
        sums.append(partial.shape)
        return partial

    monkeypatch.setattr(TensorParallelGroup, "sum", count)
    engine = Engine(MODEL, RankGroups(TensorParallelGroup(0, 2)))
    blocks = engine.transformer
    hidden, context = torch.randn(1, 64, 192), torch.randn(1, 32, 192)
    modulation = engine._modulation.by_block(torch.randn(1, engine._modulation.width))
    with torch.no_grad():
        engine.strategy.blocks(blocks, hidden, context, modulation, engine._rotary(Geometry(8, 8), 32, ()))
    assert len(sums) == 3 * len(blocks.transformer_blocks) + len(blocks.single_transformer_blocks)
    assert sums[0] == (1, 96, 192), "attention's outputs for image and text"


def test_a_size_that_does_not_divide_the_heads_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size 4 does not divide the 6 .* one of \[1, 2, 3, 6\]"):
        load_transformer(MODEL, TensorParallelGroup(0, 4), CPU, torch.float32)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no tensor-parallel plan"):
        shard_specs(nn.Linear(2, 2), 2)
