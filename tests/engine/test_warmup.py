"""What a rank does before its first plan: it measures steps, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.engine.checkpoint_files import CheckpointError
from app.engine.engine import Engine
from app.engine.warmup import warm_up
from app.messages.conditioning import Conditioning
from tests.engine.models import TinyModel, plans, run
from tests.local_group import job


@pytest.fixture(params=["flux.1-dev", "flux.1-schnell", "flux.2-klein-4b"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    return TinyModel(request.param, tmp_path)


def test_each_kind_of_step_is_measured_and_the_engine_left_as_new(model: TinyModel) -> None:
    engine, asked = Engine(model.folder), job("a/0", size=(64, 64), steps=3)
    times = warm_up(engine, asked, text_tokens=12, max_rows=8)
    assert [(one.rows, one.compute) for one in times] == [(1, True), (1, False), (2, True), (2, False)]
    assert all(one.seconds > 0 for one in times)
    assert not engine.rows
    conditioning = model.conditioning(asked)
    expected = run(Engine(model.folder), plans(asked), conditioning)
    assert torch.equal(run(engine, plans(asked), conditioning), expected)


def test_a_rank_that_never_has_two_rows_warms_up_with_one(model: TinyModel) -> None:
    one_step = job("a/0", size=(64, 64), steps=1)
    times = warm_up(Engine(model.folder), one_step, text_tokens=12, max_rows=1)
    assert [(one.rows, one.compute) for one in times] == [(1, True), (1, False)]


def test_what_is_measured_is_a_step_and_no_first_one(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass, in which a compiler would run, does not count, and the fastest of the others does."""
    engine = Engine(model.folder)
    ran: list[tuple[int, bool]] = []
    slow = iter([50.0] * 4 + [3.0, 0.5, 2.0, 0.25] + [1.0] * 5)
    execute = engine.execute

    def timed(plan, conditioning: tuple[Conditioning, ...] = ()):
        result = execute(plan, conditioning)
        if not plan.rows:
            return result
        ran.append((len(plan.rows), plan.rows[0].branches[0].compute))
        return type(result)(**{**vars(result), "seconds": next(slow)})

    monkeypatch.setattr(engine, "execute", timed)
    times = warm_up(engine, job("a/0", size=(64, 64)), text_tokens=12, max_rows=2)
    assert ran == [(1, True), (1, False), (2, True), (2, False)] * 3 + [(1, True)], "another size comes last"
    assert [one.seconds for one in times] == [1.0, 0.5, 1.0, 0.25]


def test_weights_that_are_not_finite_are_refused(model: TinyModel) -> None:
    engine = Engine(model.folder)
    next(engine.transformer.x_embedder.parameters())[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite: the weights are damaged"):
        warm_up(engine, job("a/0", size=(64, 64), steps=3), text_tokens=12, max_rows=2)
