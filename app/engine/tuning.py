"""Attention kernels, compiled blocks and 8-bit weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from app.engine.attention import use_positions
from app.engine.fp8 import Quantization
from app.engine.sequence import SequenceParallelGroup

AttentionBackend = Literal["native", "xformers", "flash"]
_PACKAGES = {"xformers": "xformers", "flash": "flash-attn"}
GRAPHS_PER_BLOCK = 16
"""A kind of block is compiled for one row and for several, and again where image and text happen to have equally many
tokens; many more graphs would be a mistake, and torch then stops."""
PROBED_CHANNELS = 128
"""Channels of an attention head in FLUX."""


class TuningError(ValueError):
    """A tuning that this machine cannot run; the message names the setting and what to do."""


@dataclass(frozen=True)
class Tuning:
    """How the transformer runs.

    Attributes:
        attention_backend: ``native`` is torch's own, which picks a flash kernel where there is one.
        compile: compile the blocks of the stack; their first run waits for it.
        quantization: ``fp8`` for the weights that tensor parallelism splits.
        modulation_on_host: keep the weights that only a row's admission needs in host memory.
        compiler: torch.compile's backend.
    """

    attention_backend: AttentionBackend = "native"
    compile: bool = False
    quantization: Quantization | None = None
    modulation_on_host: bool = False
    compiler: str = "inductor"


def check_attention(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a backend that would fail at the first image.

    Raises:
        TuningError: ``backend`` has no kernels for this device or precision.
    """
    if backend == "native":
        return
    if device.type != "cuda":
        raise TuningError(f"attention_backend {backend!r} needs CUDA, and the ranks run on {device.type}: set native")
    if backend == "flash" and dtype is torch.float32:
        raise TuningError("attention_backend 'flash' has no float32 kernels: set dtype to bfloat16, or native")


def tune(
    transformer: Any,
    tuning: Tuning,
    device: torch.device,
    dtype: torch.dtype,
    group: SequenceParallelGroup = SequenceParallelGroup(),  # noqa: B008 - frozen
) -> None:
    """Apply attention kernels and compilation to a loaded shard, in place; the loader has quantized its weights.

    Raises:
        TuningError: this machine cannot run it.
    """
    check_attention(tuning.attention_backend, device, dtype)
    use_positions(transformer, group, complex_rotary=not tuning.compile)
    if tuning.attention_backend != "native":
        _set_attention(transformer, tuning.attention_backend, device, dtype)
    if tuning.compile:
        # Block by block: two kinds are compiled, not 57 copies. Numbers of rows and tokens are symbolic, so that one
        # graph serves every batch without padding.
        # A setting of the process, since torch.compile itself takes no limit in torch 2.11.
        torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=tuning.compiler)


def _set_attention(transformer: Any, backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
    noisy = logging.getLogger("diffusers.models.modeling_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it warns at each start that the dispatcher is experimental
    try:
        transformer.set_attention_backend(backend)
        # The package may be there without kernels for this card, torch or CUDA.
        token = torch.zeros(1, 1, 1, PROBED_CHANNELS, device=device, dtype=dtype)
        dispatch_attention_fn(token, token, token, backend=AttentionBackendName(backend))
    except RuntimeError as error:
        raise TuningError(
            f"attention_backend {backend!r} needs the package {_PACKAGES[backend]!r} on every node, for this card, "
            f"torch and CUDA: install it, or set native ({error})"
        ) from error
    finally:
        noisy.setLevel(level)
