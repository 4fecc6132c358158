"""Tokens shared among ranks, alone and beside tensor parallelism, equal one rank that has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.process_groups import RankGroups
from app.engine.sequence import SequenceParallelGroup, check_heads
from tests.engine.mixed import mixed
from tests.local_group import MODEL, execute
from tests.ranks import on_ranks, relative_error


def _execute_mix(
    groups: RankGroups,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Size]]:
    """Latents, and the shapes of residuals half way."""
    engine = Engine(MODEL, groups)
    formed, conditioning = mixed()
    half = len(formed) // 2
    latents = execute(engine, formed[:half], conditioning)
    kept = {name: row.branches["cond"].residuals for name, row in engine.rows.items()}
    shapes = {name: residuals[0].shape for name, residuals in kept.items() if residuals}
    return latents | execute(engine, formed[half:], conditioning), shapes


@pytest.mark.parametrize(("tensor", "sequence"), [(1, 2), (1, 3), (2, 2)])
def test_shared_tokens_equal_the_whole(tensor: int, sequence: int, tmp_path: Path) -> None:
    """(2, 2) has three heads a shard, which two ranks share unevenly."""
    shared, residuals = on_ranks((tensor, sequence, 1), tmp_path, _execute_mix)
    whole, all_residuals = _execute_mix(RankGroups())
    assert shared.keys() == whole.keys() == {"a/0", "b/0", "c/0", "d/0"}
    for row_id, expected in whole.items():
        assert relative_error(shared[row_id], expected) <= 1e-5
    assert residuals.keys() == all_residuals.keys() == {"b/0", "c/0", "d/0"}
    for row_id, (tokens, channels) in all_residuals.items():
        assert residuals[row_id] == (-(-tokens // sequence), channels), "rank 0 keeps its part only"


def _round_trip(groups: RankGroups) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sequence, found = groups.sequence, []
    for tokens, heads in ((12, 4), (13, 3), (5, 5)):
        whole = torch.randn(2, tokens, heads, 6, generator=torch.Generator().manual_seed(tokens))
        own = sequence.part(whole.flatten(2)).unflatten(2, (heads, 6))
        made = sequence.attend(own, 2 * own, 3 * own, sequence.part_sizes(tokens), _of_all_tokens)
        gathered = sequence.gather(made.flatten(2), tokens).unflatten(2, (heads, 6))
        found.append((gathered, _of_all_tokens(whole, 2 * whole, 3 * whole)))
    return found


def _of_all_tokens(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query * key.sum(1, keepdim=True) + value.flip(1)


def test_every_head_sees_every_token(tmp_path: Path) -> None:
    for ours, expected in on_ranks((1, 3, 1), tmp_path, _round_trip):
        torch.testing.assert_close(ours, expected)


def test_parts_differ_by_one_at_most() -> None:
    assert SequenceParallelGroup(0, 3).part_sizes(32, 64, 0) == [33, 32, 31]
    tokens = torch.arange(64.0)[:, None]
    parts = [SequenceParallelGroup(rank, 3).part(tokens) for rank in range(3)]
    assert [len(part) for part in parts] == SequenceParallelGroup(0, 3).part_sizes(64)
    assert torch.equal(torch.cat(parts), tokens)


def test_more_ranks_than_heads() -> None:
    check_heads(3, 3)
    with pytest.raises(ValueError, match="sequence_parallel_size is 4, and a shard has 3 attention heads"):
        check_heads(3, 4)
