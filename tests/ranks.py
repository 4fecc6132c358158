"""Work done by several ranks: real processes and real gloo collectives on this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from app.engine.process_groups import join

# Ranks are forks of one process that has imported what they need, which takes longer than most of their work.
START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["tests.ranks", "tests.engine.models"])


def on_ranks(sizes: tuple[int, int, int], folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(groups, *arguments)`` returns on rank 0.

    Args:
        sizes: how many ranks share the weights, the tokens, and the CFG branches.
        folder: an empty one; the ranks meet there.
        work: a function of a module, since it is sent to other processes.
    """
    mp.start_processes(_rank, args=(sizes, str(folder), work, arguments), nprocs=prod(sizes), start_method=START_METHOD)
    return torch.load(folder / "result.pt", weights_only=False)


def _rank(
    rank: int, sizes: tuple[int, int, int], folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", prod(sizes))
    groups = join(rank, sizes, store, torch.device("cpu"), timeout_seconds=120)
    result = work(groups, *arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    torch.distributed.barrier()
    # Ranks end by being killed, as in the service: in an orderly exit gloo's threads may abort the process when the
    # other one is gone already, which says nothing about the tensors.
    os._exit(0)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of ``expected``."""
    return float((ours - expected).norm() / expected.norm())
