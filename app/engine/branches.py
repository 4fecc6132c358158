"""CFG parallelism: two copies of a shard, each of which runs one of an image's two CFG branches.

Images with one branch alternate between the copies, so that neither waits for the other's images only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class BranchParallelGroup:
    """This process's place among the copies that share the CFG branches; ``size`` 1 has no process group."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def merge(self, own: torch.Tensor, owners: Sequence[int]) -> torch.Tensor:
        """What all copies computed, equal on all of them.

        Args:
            own: (this rank's items, ...), in their order.
            owners: the rank of each item's copy.

        Returns:
            (items, ...), in the order of ``owners``.
        """
        if self.size == 1:
            return own
        counts = [owners.count(rank) for rank in range(self.size)]
        received = own.new_empty(len(owners), *own.shape[1:])
        sent = own.repeat(self.size, *[1] * (own.dim() - 1))
        dist.all_to_all_single(received, sent, counts, [len(own)] * self.size, group=self.process_group)
        order = sorted(range(len(owners)), key=owners.__getitem__)  # stable: as each rank sent its own
        merged = torch.empty_like(received)
        merged[order] = received
        return merged
