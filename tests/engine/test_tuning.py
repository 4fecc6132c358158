"""Compiled blocks, 8-bit weights: the same images at another cost, or an error at the start."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from app.engine.engine import Engine
from app.engine.fp8 import FLOAT8, Fp8Linear
from app.engine.tuning import Tuning, UsualRow
from app.engine.warmup import warm_up
from app.messages.jobs import DenoiseJob
from tests.engine.models import TEXT_TOKENS, TinyModel, image, together
from tests.local_group import job, psnr

COMPILED = Tuning(compile=True, usual=UsualRow(24, TEXT_TOKENS), compiler="eager")
FP8 = Tuning(quantization="fp8")


@pytest.fixture(scope="module", params=["flux.1-kontext-dev", "flux.2-klein-4b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(request.param, tmp_path_factory.mktemp("models") / "model")


def jobs(rows: int, width: int, height: int) -> list[DenoiseJob]:
    return [job(f"{index}/0", size=(width, height), steps=2, seed=index) for index in range(rows)]


def latents(engine: Engine, model: TinyModel, asked: list[DenoiseJob], sources: int = 0) -> torch.Tensor:
    """(rows, image_tokens, channels)."""
    conditioning = model.conditioning(asked[0], [image(64, 64)] * sources)
    engine.restart()  # and its blocks stay compiled
    for plan in together(asked):
        made = engine.execute(plan, [conditioning for _ in plan.admit]).latents
    return torch.stack([made[one.row_id] for one in asked])


@pytest.mark.usefixtures("_fresh_compiler")
def test_what_a_warm_up_compiles_serves_every_batch_without_a_break(model: TinyModel) -> None:
    compiled, eager = Engine(model.folder, tuning=COMPILED), Engine(model.folder)
    (usual,) = jobs(1, 96, 64)
    warm_up(compiled, usual, TEXT_TOKENS, max_rows=8)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    shapes = [(1, 96, 64, 0), (2, 96, 64, 0), (3, 96, 64, 0), (8, 64, 64, 0), (1, 160, 96, 0), (5, 128, 64, 1)]
    for rows, width, height, sources in [*shapes, (1, 64, 80, 1), (4, 80, 96, 0)]:
        asked = jobs(rows, width, height)
        assert torch.equal(latents(compiled, model, asked, sources), latents(eager, model, asked, sources))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_fp8_paints_nearly_the_same(model: TinyModel) -> None:
    asked = jobs(2, 96, 64)
    exact, rounded = (latents(Engine(model.folder, tuning=tuning), model, asked, 1) for tuning in (Tuning(), FP8))
    error = (exact - rounded).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    assert psnr(model.decode(exact[0], asked[0]), model.decode(rounded[0], asked[0])) > 25


def test_fp8_halves_the_sharded_weights_of_bfloat16(model: TinyModel) -> None:
    plain, small = (Engine(model.folder, dtype=torch.bfloat16, tuning=tuning).transformer for tuning in (Tuning(), FP8))
    for name, module in small.named_modules():
        if isinstance(module, Fp8Linear):
            assert module.weight.dtype is FLOAT8
            assert 2 * module.weight.nbytes == plain.get_submodule(name).weight.nbytes
    held = sum(module.weight.nbytes for module in small.modules() if isinstance(module, Fp8Linear))
    blocks = [*plain.transformer_blocks.parameters(), *plain.single_transformer_blocks.parameters()]
    assert 2 * held > 0.5 * sum(parameter.nbytes for parameter in blocks)
