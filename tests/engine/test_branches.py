"""CFG branches on two halves of a group equal one rank that runs both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from app.engine.branches import BranchParallelGroup
from app.engine.engine import Engine
from app.engine.process_groups import RankGroups
from tests.engine.mixed import mixed
from tests.local_group import MODEL, execute
from tests.ranks import on_ranks, relative_error


def _execute_mix(groups: RankGroups) -> tuple[dict[str, torch.Tensor], set[tuple[str, str]]]:
    """Latents, and which rows' branches have residuals here half way."""
    engine = Engine(MODEL, groups)
    formed, conditioning = mixed()
    half = len(formed) // 2
    latents = execute(engine, formed[:half], conditioning)
    kept = {
        (row_id, name) for row_id, row in engine.rows.items() for name, one in row.branches.items() if one.residuals
    }
    return latents | execute(engine, formed[half:], conditioning), kept


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 2)])
def test_halves_equal_the_whole(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    made, kept = on_ranks(sizes, tmp_path, _execute_mix)
    whole, all_kept = _execute_mix(RankGroups())
    assert made.keys() == whole.keys() == {"a/0", "b/0", "c/0", "d/0"}
    for row_id, expected in whole.items():
        assert relative_error(made[row_id], expected) <= 1e-5
    assert {("c/0", "cond"), ("c/0", "uncond")} <= all_kept
    assert len(kept & {("c/0", "cond"), ("c/0", "uncond")}) == 1, "each half keeps the residuals of its own branch"


@pytest.mark.parametrize("owners", [[0, 1, 0, 0, 1], [1, 1], [0]])
def test_items_come_back_in_their_order(owners: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    items = torch.arange(len(owners) * 6.0).view(-1, 2, 3)
    shares = [items[[owner == rank for owner in owners]] for rank in range(2)]

    def exchange(
        received: torch.Tensor, sent: torch.Tensor, receives: list[int], sends: list[int], **_: object
    ) -> None:
        assert torch.equal(sent, torch.cat([shares[0]] * 2))
        assert receives == [len(share) for share in shares]
        assert sends == [len(shares[0])] * 2
        received.copy_(torch.cat(shares))

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    assert torch.equal(BranchParallelGroup(0, 2).merge(shares[0], owners), items)
