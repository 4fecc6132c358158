"""Several plans in one call: the same results as one by one, each with its own time."""

from __future__ import annotations

import pytest
import torch

from app.engine import stopwatch
from app.engine.engine import Engine
from app.engine.stopwatch import Stopwatch
from tests.local_group import MODEL, job, plans, random_conditioning


def test_laps_are_the_times_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 3.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.lap()
    watch.lap()
    assert watch.laps() == [2.0, 0.5]


def test_plans_of_one_message_give_what_they_give_one_by_one() -> None:
    jobs = [job("a/0", steps=3, size=(64, 64)), job("b/0", steps=4, size=(64, 64), seed=3)]
    tensors = {one.row_id: random_conditioning(one, seed) for seed, one in enumerate(jobs)}
    formed = plans(jobs, arrivals=[0, 1])
    admitted = [tensors[one.row_id] for plan in formed for one in plan.admit]
    together = Engine(MODEL).execute_all(formed, admitted)
    engine = Engine(MODEL)
    alone = [engine.execute(plan, [tensors[one.row_id] for one in plan.admit]) for plan in formed]
    assert [one.sequence for one in together] == [plan.sequence for plan in formed]
    assert [one.digest for one in together] == [one.digest for one in alone]
    assert all(one.seconds > 0 for one in together)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.latents.keys() == theirs.latents.keys()
        assert all(torch.equal(latents, theirs.latents[row_id]) for row_id, latents in ours.latents.items())
    assert {row_id for one in together for row_id in one.latents} == {"a/0", "b/0"}
