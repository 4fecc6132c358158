"""Modulation computed ahead equals the blocks' own, bit by bit, and plans must say which steps compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.loading import load_transformer, meta_transformer
from app.engine.modulation import LookUp, Modulation
from app.engine.parallel import TensorParallelGroup, local_ranges, modulation_linears, shard_specs
from app.engine.tuning import Tuning
from benchmarks.make_checkpoint import make_checkpoint
from tests.engine.models import TinyModel, plans, run
from tests.local_group import job

MODELS = ("flux.1-dev", "flux.1-schnell", "flux.2-klein-4b")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    def make(name: str) -> TinyModel:
        return TinyModel(name, tmp_path_factory.mktemp("modulation") / name)

    return make


def own_modulation(transformer: torch.nn.Module, temb: torch.Tensor) -> list[torch.Tensor]:
    """What each modulation module of an untouched transformer makes of ``temb``, block by block."""
    made = []
    for names in modulation_linears(transformer):
        parts = []
        for name in names:
            owner = transformer.get_submodule(name.rpartition(".")[0])
            activation = owner.silu if hasattr(owner, "silu") else owner.act_fn
            parts.append(owner.linear(activation(temb)))
        made.append(torch.cat(parts, dim=1))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_what_is_computed_ahead_is_what_the_blocks_would_compute(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(name, "tiny", tmp_path / name, components=("transformer", "scheduler"))
    transformer = load_transformer(folder, TensorParallelGroup(), CPU, dtype)
    temb = torch.randn(9, transformer.get_submodule(modulation_linears(transformer)[0][0]).in_features, dtype=dtype)
    expected = own_modulation(transformer, temb)
    modulation = Modulation(transformer, TensorParallelGroup(), CPU)
    ahead = modulation.ahead(temb)
    by_block = modulation.by_block(ahead)
    assert torch.equal(ahead, torch.cat(expected, dim=1))
    for ours, own in zip(by_block if isinstance(by_block, tuple) else [by_block], expected, strict=True):
        assert torch.equal(ours, own)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_the_ranks_shares_add_up_to_the_whole(name: str, size: int, tmp_path: Path) -> None:
    folder = make_checkpoint(name, "tiny", tmp_path / name, components=("transformer", "scheduler"))
    whole = load_transformer(folder, TensorParallelGroup(), CPU, torch.float32)
    temb = torch.randn(5, whole.get_submodule(modulation_linears(whole)[0][0]).in_features)
    heads = int(whole.config.num_attention_heads)
    if heads % size:
        pytest.fail(f"the tiny checkpoint has {heads} heads: choose another size")
    expected = Modulation(whole, TensorParallelGroup(), CPU).ahead(temb)

    class OneOf(TensorParallelGroup):
        def sum(self, partial: torch.Tensor) -> torch.Tensor:
            return partial

    parts = []
    for rank in range(size):
        group = OneOf(rank, size)
        shard = load_transformer(folder, group, CPU, torch.float32)
        parts.append(Modulation(shard, group, CPU).ahead(temb))
    assert torch.allclose(sum(parts), expected, rtol=0, atol=1e-6)
    assert all((part == 0).float().mean() > 0.9 * (1 - 1 / size) for part in parts)


def test_every_rank_reads_only_its_share(tmp_path: Path) -> None:
    folder = make_checkpoint("flux.1-dev", "tiny", tmp_path / "dev", components=("transformer", "scheduler"))
    whole = meta_transformer(folder / "transformer")
    specs = shard_specs(whole, 2)
    for names in modulation_linears(whole):
        for name in names:
            columns = len(whole.get_submodule(name).weight)
            assert local_ranges(specs[f"{name}.weight"], 1, 2) == [(columns // 2, columns)]


def test_the_blocks_hold_no_modulation_weights(model_of: Callable[[str], TinyModel]) -> None:
    engine = Engine(model_of("flux.1-dev").folder)
    for names in modulation_linears(engine.transformer):
        assert all(isinstance(engine.transformer.get_submodule(name), LookUp) for name in names)
    left = [name for name, _ in engine.transformer.named_parameters() if ".norm1" in name or ".norm." in name]
    assert left == []


def test_weights_on_the_host_make_the_same_image(model_of: Callable[[str], TinyModel]) -> None:
    model = model_of("flux.1-dev")
    asked = job("a/0", size=(64, 64), steps=3)
    images = [
        run(Engine(model.folder, tuning=Tuning(modulation_on_host=on_host)), plans(asked), model.conditioning(asked))
        for on_host in (False, True)
    ]
    assert torch.equal(*images)


def test_only_announced_steps_may_compute(model_of: Callable[[str], TinyModel]) -> None:
    model = model_of("flux.1-dev")
    every = job("a/0", size=(64, 64), steps=3)
    announced = job("a/0", size=(64, 64), steps=3, computing=(0, 2))
    whole = run(Engine(model.folder), plans(every), model.conditioning(every))
    assert torch.equal(whole, run(Engine(model.folder), plans(every), model.conditioning(every)))
    with pytest.raises(LookupError, match=r"step 1 computes, and the row was admitted with \[0, 2\] only"):
        run(Engine(model.folder), plans(announced), model.conditioning(announced))
