"""Work done by several ranks: real processes and real gloo collectives on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from app.engine.parallel import TensorParallelGroup


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(group, *arguments)`` returns on rank 0 of ``size`` ranks.

    Args:
        folder: an empty one; the ranks meet there.
        work: a function of a module, since it is sent to other processes.
    """
    mp.spawn(_rank, args=(size, str(folder), work, arguments), nprocs=size)
    return torch.load(folder / "result.pt", weights_only=False)


def _rank(rank: int, size: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    group = TensorParallelGroup.join(rank, size, store, torch.device("cpu"), timeout_seconds=120)
    result = work(group, *arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    torch.distributed.barrier()
    # Ranks end by being killed, as in the service: in an orderly exit gloo's threads may abort the process when the
    # other one is gone already, which says nothing about the tensors.
    os._exit(0)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of ``expected``."""
    return float((ours - expected).norm() / expected.norm())
