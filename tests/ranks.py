"""Work done by several ranks: real processes and real gloo collectives on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from app.engine.process_groups import join


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(tensor_group, *arguments)`` returns on rank 0 of ``size`` ranks that share the weights.

    Args:
        folder: an empty one; the ranks meet there.
        work: a function of a module, since it is sent to other processes.
    """
    return on_grid(size, 1, folder, _without_sequence, work, *arguments)


def on_grid(tensor: int, sequence: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(tensor_group, sequence_group, *arguments)`` returns on rank 0; otherwise like `on_ranks`."""
    mp.spawn(_rank, args=(tensor, sequence, str(folder), work, arguments), nprocs=tensor * sequence)
    return torch.load(folder / "result.pt", weights_only=False)


def _without_sequence(tensor: Any, sequence: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    return work(tensor, *arguments)


def _rank(
    rank: int, tensor: int, sequence: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", tensor * sequence)
    groups = join(rank, tensor, sequence, store, torch.device("cpu"), timeout_seconds=120)
    result = work(*groups, *arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    torch.distributed.barrier()
    # Ranks end by being killed, as in the service: in an orderly exit gloo's threads may abort the process when the
    # other one is gone already, which says nothing about the tensors.
    os._exit(0)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of ``expected``."""
    return float((ours - expected).norm() / expected.norm())
