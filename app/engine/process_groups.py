"""The ranks of a group meet here: which of them share weights, and which share tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from app.engine.parallel import TensorParallelGroup
from app.engine.sequence import SequenceParallelGroup


def join(
    rank: int,
    tensor_parallel_size: int,
    sequence_parallel_size: int,
    store: Store,
    device: torch.device,
    timeout_seconds: float = 600.0,
) -> tuple[TensorParallelGroup, SequenceParallelGroup]:
    """Meet the other ranks through ``store``: NCCL between GPUs, gloo between CPUs.

    Neighbouring ranks share one copy of the weights, since tensor parallelism exchanges more; ranks with equal shards
    share the tokens.
    """
    size = tensor_parallel_size * sequence_parallel_size
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # With its device, NCCL connects at once: a network that does not work fails here and not at the first step.
    own = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, timeout=timeout, world_size=size, rank=rank, device_id=own)
    copy, shard = divmod(rank, tensor_parallel_size)
    copies = [list(range(first, first + tensor_parallel_size)) for first in range(0, size, tensor_parallel_size)]
    tensor = TensorParallelGroup(shard, tensor_parallel_size, _subgroup(copies, timeout))
    return tensor, SequenceParallelGroup(
        copy, sequence_parallel_size, _subgroup(list(zip(*copies, strict=True)), timeout)
    )


def _subgroup(ranks: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """This process's group where all ranks are split into ``ranks``; every process must call this."""
    if len(ranks) == 1:
        return dist.group.WORLD
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration([list(group) for group in ranks], timeout=timeout)
    return own
