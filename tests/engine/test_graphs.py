"""Passes that are recorded and replayed make the same images as those that are not; a recorder stands in for CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.graphs import Graphs, Tensors
from app.engine.process_groups import RankGroups
from app.engine.tuning import Tuning
from app.engine.warmup import warm_up
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraUse
from app.messages.plans import StepPlan
from magcache_core import Plan, decisions
from tests.engine.lora_cases import flux_tiny, random_adapter, save_peft
from tests.engine.models import TEXT_TOKENS, TinyModel, image, plans, run, together
from tests.local_group import MODEL, execute, job, random_conditioning
from tests.ranks import on_ranks

SIZE = (64, 80)
SCHEDULE = "C..C.C"


class OnePool:
    """Records as CUDA does, without CUDA: a replay reads the same buffers, and what others left is overwritten.

    Attributes:
        recorded: how many passes.
        replays: how many of them.
    """

    def __init__(self) -> None:
        self.recorded = self.replays = 0
        self._results: list[Tensors] = []

    def __call__(self, call: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
        results = tuple(torch.full_like(made, torch.nan) for made in call())  # a capture computes nothing
        self._results.append(results)
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            for other in self._results:
                for result in other:
                    result.fill_(torch.nan)
            for result, made in zip(results, call(), strict=True):
                result.copy_(made)

        return replay, results


def recorded(engine: Engine, rows: int = 2, text_tokens: int = TEXT_TOKENS) -> tuple[Engine, OnePool]:
    """``engine`` after a warm-up that recorded images of `SIZE`, and what recorded them."""
    pool = OnePool()
    engine.graphs = Graphs(pool)
    warm_up(engine, job("warm/0", size=SIZE, steps=2), text_tokens, rows)
    pool.replays = 0
    return engine, pool


def cached(asked: DenoiseJob) -> list[StepPlan]:
    """One image by `SCHEDULE`; a negative branch computes at other steps."""
    apart = {"cond": SCHEDULE, "uncond": "CC..CC"}
    decided = {branch: decisions(Plan(apart[branch])) for branch in asked.branches}
    return plans(asked, decided)


@pytest.fixture(scope="module", params=["flux.1-kontext-dev", "flux.2-klein-base"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(request.param, tmp_path_factory.mktemp("graphs") / "model")


def test_a_warm_up_records_what_it_times(model: TinyModel) -> None:
    assert recorded(Engine(model.folder))[1].recorded == 4, "one row and two, computed and reused"
    assert recorded(Engine(model.folder), rows=1)[1].recorded == 2


@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.0])
def test_replayed_steps_make_the_same_image(model: TinyModel, true_cfg_scale: float) -> None:
    asked = job("a/0", size=SIZE, steps=6, true_cfg_scale=true_cfg_scale)
    conditioning = model.conditioning(asked)
    engine, pool = recorded(Engine(model.folder))
    assert torch.equal(run(engine, cached(asked), conditioning), run(Engine(model.folder), cached(asked), conditioning))
    # With true CFG, steps 1, 3 and 4 compute in one branch and reuse in the other: two passes of one row each.
    assert pool.replays == (6 if true_cfg_scale == 1.0 else 6 + 3)
    assert pool.recorded == 4, "nothing is recorded after the warm-up"


def test_other_numbers_of_rows_sizes_and_references_run_as_they_are(model: TinyModel) -> None:
    engine, pool = recorded(Engine(model.folder))
    plain = Engine(model.folder)
    three = [job(f"{index}/0", size=SIZE, steps=2, seed=index) for index in range(3)]
    other, edit = job("b/0", size=(64, 64), steps=2), job("c/0", size=SIZE, steps=2)
    for asked, images in ((three, []), ([other], []), ([edit], [image(64, 64)])):
        conditioning = model.conditioning(asked[0], images)
        for one in (engine, plain):
            one.restart()
        for plan in together(asked):
            made, expected = (one.execute(plan, [conditioning for _ in plan.admit]).latents for one in (engine, plain))
        for row_id, latents in expected.items():
            assert torch.equal(made[row_id], latents)
    assert pool.replays == 0


def test_a_row_with_adapters_is_not_replayed(tmp_path: Path) -> None:
    save_peft(tmp_path / "some.safetensors", random_adapter(flux_tiny(), 1))
    engine, pool = recorded(Engine(MODEL, loras=tmp_path), text_tokens=32)
    assert engine.loras is not None
    engine.loras.load("some")
    plain, adapted = job("a/0", size=SIZE, steps=2), job("b/0", size=SIZE, steps=2, loras=(LoraUse("some", 1.0),))
    given = random_conditioning(plain)
    without = Engine(MODEL, loras=tmp_path)
    assert without.loras is not None
    without.loras.load("some")
    for asked, replays in ((plain, 2), (adapted, 0)):
        pool.replays = 0
        made, expected = (execute(one, together([asked]), {asked.row_id: given}) for one in (engine, without))
        assert torch.equal(made[asked.row_id], expected[asked.row_id])
        assert pool.replays == replays
        for one in (engine, without):
            one.restart()


def shared(groups: RankGroups, graphs: bool) -> torch.Tensor:
    """The latents of an image by several ranks."""
    engine = Engine(MODEL, groups)
    if graphs:
        engine, pool = recorded(engine, text_tokens=32)
        assert pool.recorded == 4
    asked = job("a/0", size=SIZE, steps=6)
    return run(engine, cached(asked), random_conditioning(asked))


def test_ranks_replay_their_collectives(tmp_path: Path) -> None:
    """Shared weights and shared tokens at once; gloo's collectives are called again, as NCCL's are replayed."""
    images = []
    for graphs in (False, True):
        folder = tmp_path / str(graphs)
        folder.mkdir()
        images.append(on_ranks((2, 2, 1), folder, shared, graphs))
    assert torch.equal(*images)


def test_what_no_graph_can_record_is_refused(model: TinyModel) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs CUDA, and the ranks run on cpu: set cuda_graphs to false"):
        Engine(model.folder, tuning=Tuning(cuda_graphs=True))
