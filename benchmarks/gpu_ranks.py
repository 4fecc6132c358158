"""Two ranks on one card: they exchange CUDA tensors over gloo (NCCL refuses to), and must make one rank's image."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import FileStore

from app.engine.engine import Engine
from app.engine.parallel import TensorParallelGroup
from app.engine.process_groups import RankGroups
from app.messages.conditioning import PromptEmbeddings
from benchmarks.gpu_runs import Ours, Request
from benchmarks.make_checkpoint import make_checkpoint
from magcache_core import Plan

SIZE, TEXT_TOKENS = 64, 16
PLAN = Plan("CC.C.C..")
TOLERANCE = 1e-4


def equal(device: torch.device) -> dict[str, Any]:
    """How far two ranks' image is from one's, at tiny geometry in float32, with reused steps.

    Raises:
        ArithmeticError: further than rounding explains.
    """
    folder = Path(tempfile.mkdtemp(prefix="flux-gpu-ranks-"))
    model = make_checkpoint("flux.1-dev", "tiny", folder / "model", components=["transformer", "scheduler"])
    alone = _image(model, RankGroups(), device)
    mp.spawn(_rank, args=(str(folder), str(device)), nprocs=2)
    together = torch.load(folder / "latents.pt", weights_only=True)
    error = float((together - alone).norm() / alone.norm())
    if not error < TOLERANCE:
        raise ArithmeticError(f"two ranks differ from one by {error:.3g} of the norm")
    return {"backend": "gloo", "relative_difference": error}


def _image(model: Path, groups: RankGroups, device: torch.device) -> torch.Tensor:
    engine = Engine(model, groups, device, torch.float32)
    config: Any = engine.transformer.config
    generator = torch.Generator().manual_seed(1)
    prompt = PromptEmbeddings(
        torch.randn(TEXT_TOKENS, config.joint_attention_dim, generator=generator),
        torch.randn(config.pooled_projection_dim, generator=generator),
    )
    latents: torch.Tensor = Ours(engine).run(Request(SIZE, len(PLAN.schedule), prompt), PLAN)["latents"]
    return latents


def _rank(rank: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(f"{folder}/store", 2), world_size=2, rank=rank)
    latents = _image(
        Path(folder) / "model", RankGroups(TensorParallelGroup(rank, 2, dist.group.WORLD)), torch.device(device)
    )
    if rank == 0:
        torch.save(latents, f"{folder}/latents.pt")
    dist.barrier()
    os._exit(0)  # in an orderly exit gloo's threads may abort the process when the other rank is gone already
