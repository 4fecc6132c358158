"""GELU and sums within products: what the stack makes, compiled and shared by ranks, and where it is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.epilogues import ActivatedProduct, ActivatedSingleBlock, added, join_products
from app.engine.parallel import RowParallelLinear, TensorParallelGroup
from app.engine.process_groups import RankGroups
from app.engine.tuning import Tuning
from tests.engine.lora_cases import flux_tiny, random_adapter, save_peft
from tests.engine.models import TinyModel
from tests.local_group import MODEL, execute, job, plans, random_conditioning
from tests.ranks import on_ranks, relative_error

KINDS = ActivatedProduct, ActivatedSingleBlock
EXACT_GELU = 2e-3
"""A CPU's kernel takes the exact form, which is up to 5e-4 from the tanh form that CUDA's takes."""


def images(engine: Engine) -> dict[str, torch.Tensor]:
    jobs = [job("a/0", steps=2), job("b/0", steps=2), job("c/0", steps=2, size=(96, 80))]
    given = random_conditioning(jobs[0])
    return execute(engine, plans(jobs), {one.row_id: given for one in jobs})


def changed(engine: Engine) -> Engine:
    join_products(engine.transformer)
    return engine


def work(groups: RankGroups) -> dict[str, torch.Tensor]:
    return images(changed(Engine(MODEL, groups)))


def count(engine: Engine) -> int:
    return sum(isinstance(module, KINDS) for module in engine.transformer.modules())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_images_are_the_same(compiled: bool) -> None:
    engine = changed(Engine(MODEL, tuning=Tuning(compile=compiled, compiler="eager")))
    blocks = engine.transformer
    assert count(engine) == 2 * len(blocks.transformer_blocks) + len(blocks.single_transformer_blocks)
    made = images(engine)
    for row_id, expected in images(Engine(MODEL)).items():
        assert 0 < relative_error(made[row_id], expected) < EXACT_GELU, row_id


@torch.inference_mode()
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_two_products_are_the_one_of_both_inputs(rank: int | None) -> None:
    module = torch.nn.Linear(24, 8)
    first, second = torch.randn(2, 5, 16), torch.randn(2, 5, 8)
    expected = module(torch.cat([first, second], dim=2))
    if rank is not None:
        module.__class__ = RowParallelLinear
        module.group = TensorParallelGroup(rank, 2)
        expected = module.partial(torch.cat([first, second], dim=2))
    assert relative_error(added(module, first, second), expected) < 1e-6


def test_ranks_make_the_same(tmp_path: Path) -> None:
    shared = on_ranks((2, 1, 1), tmp_path, work)
    for row_id, expected in work(RankGroups()).items():
        assert relative_error(shared[row_id], expected) <= 2e-5, row_id


def test_linears_with_more_to_do_are_left(tmp_path: Path) -> None:
    save_peft(tmp_path / "some.safetensors", random_adapter(flux_tiny(), 1))
    for engine in (Engine(MODEL, loras=tmp_path), Engine(MODEL, tuning=Tuning(quantization="fp8"))):
        assert count(changed(engine)) == 0


def test_only_a_gpu_has_it() -> None:
    assert count(Engine(MODEL, tuning=Tuning(compile=True, compiler="eager"))) == 0


def test_other_activations_are_left(tmp_path: Path) -> None:
    engine = Engine(TinyModel("flux.2-klein-4b", tmp_path / "model").folder)
    assert count(changed(engine)) == 0
