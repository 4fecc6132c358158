"""The layouts' arithmetic: what it says that a rank sends is what the engine sends; the best layout is the best."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.engine.engine import Engine
from app.engine.parallel import TensorParallelGroup
from app.engine.process_groups import RankGroups
from app.engine.sequence import SequenceParallelGroup
from benchmarks import links
from tests.local_group import MODEL, execute, job, plans, random_conditioning

TEXT, IMAGE = 32, 64
"""Tokens of a 128x128 image and its prompt in the tests."""


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 1), (1, 2), (3, 2)])
def test_what_a_rank_sends_is_what_the_engine_sends(
    tensor: int, sequence: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"sum": 0.0, "exchange": 0.0}

    def all_reduce(partial: torch.Tensor, **_: Any) -> None:
        sent["sum"] += 2 * (tensor - 1) / tensor * partial.numel()

    def all_to_all(received: torch.Tensor, given: torch.Tensor, *splits: Any, **_: Any) -> None:
        sent["exchange"] += (sequence - 1) / sequence * given.numel()
        received.zero_()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    groups = RankGroups(TensorParallelGroup(0, tensor), SequenceParallelGroup(0, sequence))
    engine = Engine(MODEL, groups)
    asked = job("a/0", steps=2)
    admission, *steps = [replace(plan) for plan in plans([asked])]
    assert len(steps) == 1
    execute(engine, [admission], {"a/0": random_conditioning()})  # which sums the modulation, once an image
    before = dict(sent)
    execute(engine, steps, {})
    config = engine.transformer.config
    monkeypatch.setattr(links, "IMAGE_TOKENS", IMAGE)
    monkeypatch.setattr(links, "TEXT_TOKENS", TEXT)
    dim = config.num_attention_heads * config.attention_head_dim
    model = links.Model("tiny", config.num_layers, config.num_single_layers, dim, config.num_attention_heads, 1.0)
    velocities = 0 if sequence == 1 else (sequence - 1) * prod((IMAGE // sequence, config.in_channels))
    counted = sum(sent.values()) - sum(before.values()) - velocities
    assert counted == pytest.approx(model.sent(tensor, sequence) / links.BYTES)


CARD = {"weights_gb": 20.0, "modulation_gb": 5.0, "computed_step_gb": 1.0}
MEMORY = {
    "residual_per_image_mb": 0.0,
    "modulation_per_image_mb": 0.0,
    "tensor_parallel_size": {"1": CARD, "2": CARD | {"weights_gb": 10.0, "modulation_gb": 2.5}},
}


@pytest.mark.parametrize(("gib", "expected"), [(10, None), (18, True), (40, False)])
def test_a_card_holds_a_rank_whole_or_with_its_modulation_on_the_host(gib: int, expected: bool | None) -> None:
    assert links.on_host(MEMORY, 1, gib) is expected


def test_layouts_use_every_card_and_leave_no_rank_without_heads() -> None:
    assert set(links.layouts(6, 4)) == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
    assert (1, 8, 1) not in set(links.layouts(6, 8))


def test_a_slow_link_gives_each_card_an_image_of_its_own() -> None:
    model = links.described("flux.1-dev")
    fast, slow = 300e9, 8e9
    assert links.best(model, MEMORY, 2, 40, slow).startswith("tp 1, sp 1, 2 replicas: ")
    assert links.best(model, MEMORY, 2, 40, fast).startswith("tp 1, sp 2: ")
    assert links.best(model, MEMORY, 2, 14, slow).startswith("tp 2, sp 1: "), "one card cannot hold it"
    assert links.best(model, MEMORY, 1, 10, fast) == "does not fit"
