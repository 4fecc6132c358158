"""What a device can do at most, and where a step's time goes: products, copies, attention, launches, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from app.engine.attention_backends import AttentionBackend, AttentionError, AttentionShape, attend, choose_attention
from app.engine.engine import Engine
from app.engine.fp8 import to_float8
from app.engine.graphs import CudaRecorder, Graphs, Tensors
from app.engine.process_groups import RankGroups
from benchmarks.roofline import best_seconds, matmul_flops_per_second, synchronize

REPEATS = 20
MOST_KERNELS = 25
TOLERANCE = 1e-2
"""Of a replayed step in bfloat16; on the CPU it is the same."""


class Unavailable(Exception):  # noqa: N818 - nothing went wrong
    """This device has no such thing to measure."""


def side(device: torch.device) -> int:
    """Of square matrices that fill the device."""
    return 8192 if device.type == "cuda" else 512


def matmul(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Large matrix products."""
    rate = matmul_flops_per_second(device, dtype, side(device), REPEATS)
    return {"side": side(device), "tflops_per_s": rate / 1e12}


def matmul_fp8(device: torch.device) -> dict[str, Any]:
    """Large products of float8 matrices with a scale per row, quantized before; with exact sums and with fast ones."""
    size = side(device)
    left, right = (to_float8(torch.randn(size, size, device=device, dtype=torch.bfloat16)) for _ in range(2))

    def product(*, fast: bool) -> torch.Tensor:
        return torch._scaled_mm(left[0], right[0].T, left[1], right[1].T, out_dtype=torch.bfloat16, use_fast_accum=fast)

    seconds = {fast: best_seconds(lambda fast=fast: product(fast=fast), device, REPEATS) for fast in (False, True)}
    rate = {fast: 2 * size**3 / one / 1e12 for fast, one in seconds.items()}
    return {"side": size, "tflops_per_s": rate[False], "tflops_per_s_fast_accumulation": rate[True]}


def copy(device: torch.device) -> dict[str, Any]:
    """A large copy within the device, counting bytes read and bytes written."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, REPEATS)
    return {"gb": source.nbytes / 1e9, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


def check_kernel(kernel: AttentionBackend, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention kernel that ``device`` lacks.

    Raises:
        Unavailable: why it can't run.
    """
    try:
        choose_attention(kernel, shape, device, dtype, RankGroups())
    except AttentionError as error:
        raise Unavailable(str(error)) from error


@torch.inference_mode()
def attention(
    kernel: AttentionBackend, shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Joint attention of one image, in the layout in which the blocks call it, by ``kernel`` alone."""
    check_kernel(kernel, shape, device, dtype)
    inputs = shape.inputs(device, dtype)
    seconds = best_seconds(lambda: attend(kernel, *inputs), device, REPEATS)
    flops = 4 * shape.tokens**2 * shape.heads * shape.channels
    return {"tokens": shape.tokens, "heads": shape.heads, "seconds": seconds, "tflops_per_s": flops / seconds / 1e12}


def again(call: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
    """A recorder for devices without graphs: what it records is called again."""
    results = call()

    def replay() -> None:
        for result, made in zip(results, call(), strict=True):
            result.copy_(made)

    return replay, results


def replayed(engine: Engine, work: Callable[[], torch.Tensor], device: torch.device) -> dict[str, Any]:
    """The time of ``work``, a step of ``engine``, launched operator by operator, and with its pass replayed.

    Raises:
        ArithmeticError: their latents differ by more than rounding explains.
    """
    on_gpu = device.type == "cuda"
    launched, launched_s = work(), best_seconds(work, device, REPEATS)
    engine.graphs = Graphs(CudaRecorder(device) if on_gpu else again)
    with engine.graphs.recording():
        replayed = work()
    replayed_s = best_seconds(work, device, REPEATS)
    engine.graphs = Graphs()
    error = float((replayed - launched).float().norm() / launched.float().norm())
    if not error < TOLERANCE:
        raise ArithmeticError(f"replayed, a step differs by {error:.3g} of the norm")
    return {"launched_s": launched_s, "replayed_s": replayed_s, "relative_difference": error, "graph": on_gpu}


def kernels(work: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) in which ``work`` spends most of its time."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    work()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        synchronize(device)
    events = [
        {
            "name": event.key[:120],
            "calls": event.count,
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3,
        }
        for event in profile.key_averages()
    ]
    return sorted(events, key=lambda event: -event["ms"])[:MOST_KERNELS]
