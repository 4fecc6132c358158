"""Who shares what with whom: every rank's place in its three groups."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from app.engine.process_groups import RankGroups
from tests.ranks import on_ranks


def _places(groups: RankGroups) -> torch.Tensor:
    """By rank: its number, and the numbers that it sums up with the others of its groups."""
    own = torch.tensor([1 << dist.get_rank()])
    found = [torch.tensor([groups.rank])]
    for group in (groups.tensor, groups.sequence, groups.branches):
        members = own.clone()
        if group.size > 1:
            dist.all_reduce(members, group=group.process_group)
        found.append(members)
    every = [torch.empty(4, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(every, torch.cat(found))
    return torch.stack(every)


def test_neighbours_share_weights_and_halves_share_branches(tmp_path: Path) -> None:
    numbers, tensor, sequence, branches = on_ranks((2, 1, 2), tmp_path, _places).T.tolist()
    assert numbers == [0, 1, 2, 3]
    assert tensor == [0b0011, 0b0011, 0b1100, 0b1100]
    assert sequence == [0b0001, 0b0010, 0b0100, 0b1000]
    assert branches == [0b0101, 0b1010, 0b0101, 0b1010]


def test_a_rank_alone() -> None:
    assert RankGroups().rank == 0
