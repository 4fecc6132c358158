"""What a step must compute, and how fast the device multiplies: together the least time that a step can take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from app.engine.geometry import Geometry
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import Part


def synchronize(device: torch.device) -> None:
    """Wait for what was started on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_inputs(
    config: Any, geometry: Geometry, text_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of one forward pass of ``FluxTransformer2DModel`` for one row."""
    guided = config.guidance_embeds
    return {
        "hidden_states": torch.randn(1, geometry.tokens, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text_tokens, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32) if guided else None,
        "img_ids": torch.zeros(geometry.tokens, 3, device=device, dtype=dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def step_flops(part: Part, geometry: Geometry, text_tokens: int) -> int:
    """Floating-point operations of the matrix products of one forward pass, counted on the meta device."""
    transformer: Any = weights.build(part)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        transformer(**forward_inputs(transformer.config, geometry, text_tokens, torch.device("meta"), torch.float32))
    return int(counter.get_total_flops())


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, side: int, repeats: int = 20) -> float:
    """The best of ``repeats`` products of two square matrices of ``side``."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: left @ right, device, repeats)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of ``repeats`` timings, after two that don't count."""
    seconds = []
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])
