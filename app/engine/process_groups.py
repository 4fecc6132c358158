"""The ranks of a group meet here: which of them share weights, which tokens, and which CFG branches."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from app.engine.branches import BranchParallelGroup
from app.engine.parallel import TensorParallelGroup
from app.engine.sequence import SequenceParallelGroup


@dataclass(frozen=True)
class RankGroups:
    """One rank's groups: with whom it shares the weights, the tokens of an image, and an image's CFG branches."""

    tensor: TensorParallelGroup = field(default_factory=TensorParallelGroup)
    sequence: SequenceParallelGroup = field(default_factory=SequenceParallelGroup)
    branches: BranchParallelGroup = field(default_factory=BranchParallelGroup)

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return (self.branches.rank * self.sequence.size + self.sequence.rank) * self.tensor.size + self.tensor.rank

    def of_first_rank(self, number: int, device: torch.device) -> int:
        """``number`` as it is on the first of all ranks, on every rank; ``device`` is where this rank computes."""
        if self.tensor.size * self.sequence.size * self.branches.size == 1:
            return number
        told = torch.tensor(number, device=device)
        dist.broadcast(told, src=0)
        return int(told)


def join(
    rank: int,
    sizes: tuple[int, int, int],
    store: Store,
    device: torch.device,
    timeout_seconds: float = 600.0,
) -> RankGroups:
    """Meet the other ranks through ``store``: NCCL between GPUs, gloo between CPUs.

    Args:
        sizes: of the groups, in the order of `RankGroups`. Neighbouring ranks share the weights, since tensor
            parallelism exchanges most; CFG parallelism, which exchanges least, is between the halves.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # With its device, NCCL connects at once: a network that does not work fails here and not at the first step.
    own = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, timeout=timeout, world_size=prod(sizes), rank=rank, device_id=own)
    ranks = torch.arange(prod(sizes)).view(sizes[::-1])  # (branches, sequence, tensor)

    def along(dimension: int) -> tuple[int, int, dist.ProcessGroup | None]:
        """This rank's place in its group along ``dimension``, the group's size, and the group."""
        members = ranks.movedim(dimension, -1).reshape(-1, ranks.shape[dimension])
        place = int((members == rank).nonzero()[0, 1])
        return place, members.shape[1], _subgroup(members.tolist(), timeout)

    return RankGroups(TensorParallelGroup(*along(2)), SequenceParallelGroup(*along(1)), BranchParallelGroup(*along(0)))


def _subgroup(ranks: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """This process's group where all ranks are split into ``ranks``; every process must call this."""
    if len(ranks) == 1:
        return dist.group.WORLD
    if len(ranks[0]) == 1:
        return None  # a group of one exchanges nothing
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    return own
