"""A rank in this process, without its actor."""

from __future__ import annotations

import pytest
import torch

from app.cluster.rank import Rank
from app.engine.engine import Engine
from app.errors import PlanMismatchError
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL, execute, job, plans, random_conditioning


@pytest.fixture
def rank() -> Rank:
    made = Rank(Settings(threads_per_rank=1, magcache=MagCacheSettings(profile="flux.1-dev")), 0)
    made.load(None)
    return made


def test_a_message_carries_plans_and_the_tensors_of_all_that_they_admit(rank: Rank) -> None:
    jobs = [job("a/0", steps=4), job("b/0", steps=2), job("c/0", steps=1)]
    tensors = {one.row_id: random_conditioning(seed=number) for number, one in enumerate(jobs)}
    formed = plans(jobs, arrivals=[0, 1, 1])
    results = rank.execute(formed, tensors["a/0"], tensors["b/0"], tensors["c/0"])
    assert [result.sequence for result in results] == [plan.sequence for plan in formed]
    assert [result.digest for result in results] == [plan.digest for plan in formed]
    latents = {row_id: value for result in results for row_id, value in result.latents.items()}
    for row_id, expected in execute(Engine(MODEL), formed, tensors).items():
        assert torch.equal(latents[row_id], expected)


def test_idle_is_what_a_rank_with_rows_waits_for_a_message(rank: Rank) -> None:
    first, second, third = plans([job("a/0", steps=5)])[:3]
    assert [result.idle_seconds for result in rank.execute((first,), random_conditioning(seed=0))] == [0.0]
    later = rank.execute((second, third))
    assert later[0].idle_seconds > 0
    assert later[1].idle_seconds == 0.0


def test_a_rank_without_rows_is_not_kept_waiting(rank: Rank) -> None:
    formed = plans([job("a/0", steps=1), job("b/0", steps=1)], arrivals=[0, 3])
    rank.execute(formed[:1], random_conditioning(seed=0))
    assert [result.idle_seconds for result in rank.execute(formed[1:], random_conditioning(seed=1))] == [0.0]


def test_a_message_out_of_order_is_refused(rank: Rank) -> None:
    first, second, third = plans([job("a/0", steps=3)])
    rank.execute((first,), random_conditioning(seed=0))
    with pytest.raises(PlanMismatchError, match="expected plan 1"):
        rank.execute((third, second))
