"""Sequence parallelism: each rank holds part of an image's tokens, and in attention part of the heads.

Before attention an all-to-all gives every rank all tokens of its share of the heads, and after it another one gives the
tokens back with all heads (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509). Each rank has the whole weights of its
tensor-parallel shard, and all else that the blocks do is done token by token. Per block a rank sends
4 (size - 1) / size² of its activations where tensor parallelism sums all of them over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SequenceParallelGroup:
    """This process's place among the ranks that share an image's tokens; ``size`` 1 has no process group.

    Text, image and reference tokens are split each on its own, into parts whose sizes differ by one at most.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def part(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``tokens``, split along the last dimension but one."""
        return tokens if self.size == 1 else tokens.tensor_split(self.size, dim=-2)[self.rank]

    def gather(self, part: torch.Tensor, tokens: int) -> torch.Tensor:
        """All of what `part` split: (rows, part, channels) -> (rows, ``tokens``, channels), equal on all ranks."""
        if self.size == 1:
            return part
        rows, own, channels = part.shape
        received = part.new_empty(tokens, rows, channels)
        sent = part.transpose(0, 1).repeat(self.size, 1, 1)
        self._exchange(received, sent, self.part_sizes(tokens), [own] * self.size, rows * channels)
        return received.transpose(0, 1)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sizes: Sequence[int],
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """``attention`` of all tokens, each rank for its share of the heads.

        Args:
            query, key, value: (rows, this rank's tokens, heads, head_dim), positions applied.
            sizes: tokens of each rank.
            attention: takes and gives (rows, tokens, this rank's share of the heads, head_dim).

        Returns:
            (rows, this rank's tokens, heads, head_dim).
        """
        rows, tokens, heads, channels = query.shape
        shares = self.part_sizes(heads)
        # Tokens come first, so that what the ranks send lies one after another: (tokens, q/k/v, rows, heads, head_dim).
        together = torch.stack([query, key, value]).permute(2, 0, 1, 3, 4)
        sent = torch.cat([share.flatten() for share in together.split(shares, dim=3)])
        share = shares[self.rank]
        received = sent.new_empty(sum(sizes), 3, rows, share, channels)
        here, there = ([tokens * n for n in shares], [n * share for n in sizes])
        self._exchange(received, sent, there, here, 3 * rows * channels)
        attended = attention(*received.permute(1, 2, 0, 3, 4).unbind()).transpose(0, 1).contiguous()
        result = sent.new_empty(tokens * rows * heads * channels)
        self._exchange(result, attended, here, there, rows * channels)
        parts = result.split([n * rows * channels for n in here])
        shaped = [part.view(tokens, rows, -1, channels) for part in parts]
        return torch.cat(shaped, dim=2).transpose(0, 1)

    def _exchange(
        self, received: torch.Tensor, sent: torch.Tensor, receives: Sequence[int], sends: Sequence[int], unit: int
    ) -> None:
        """All-to-all of ``sent`` into ``received``; what goes to and comes from each rank is counted in ``unit``s."""
        dist.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            [unit * count for count in receives],
            [unit * count for count in sends],
            group=self.process_group,
        )

    def part_sizes(self, *counts: int) -> list[int]:
        """What each rank has when ``counts`` of tokens or heads are split, each on its own."""
        return [sum(count // self.size + (rank < count % self.size) for count in counts) for rank in range(self.size)]


def check_heads(heads: int, sequence_parallel_size: int) -> None:
    """Refuse more ranks than there are heads.

    Args:
        heads: attention heads of one tensor-parallel shard.

    Raises:
        ValueError: some rank would have none.
    """
    if sequence_parallel_size > heads:
        raise ValueError(
            f"sequence_parallel_size is {sequence_parallel_size}, and a shard has {heads} attention heads to share: "
            f"lower it to {heads} at most, or lower tensor_parallel_size"
        )
