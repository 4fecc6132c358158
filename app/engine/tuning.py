"""How the transformer runs: attention kernels, compiled blocks, 8-bit weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from app.engine.attention import use_positions
from app.engine.attention_backends import AttentionBackend
from app.engine.fp8 import Quantization
from app.engine.sequence import SequenceParallelGroup

GRAPHS_PER_BLOCK = 16
"""A kind of block is compiled for one row and for several, and again where image and text happen to have equally many
tokens; many more graphs would be a mistake, and torch then stops."""


@dataclass(frozen=True)
class Tuning:
    """How the transformer runs.

    Attributes:
        attention_backend: kernels; ``auto`` is the fastest of those that rank 0 has, at ``attention_tokens`` tokens.
        compile: compile the blocks of the stack; their first run waits for it.
        quantization: ``fp8`` for the weights that tensor parallelism splits.
        modulation_on_host: keep the weights that only a row's admission needs in host memory.
        compiler: torch.compile's backend.
    """

    attention_backend: AttentionBackend = "auto"
    attention_tokens: int = 4608
    compile: bool = False
    quantization: Quantization | None = None
    modulation_on_host: bool = False
    compiler: str = "inductor"


def tune(
    transformer: Any,
    tuning: Tuning,
    group: SequenceParallelGroup = SequenceParallelGroup(),  # noqa: B008 - frozen
) -> None:
    """Compile the blocks of a loaded shard, in place, or prepare them for running as they are."""
    use_positions(transformer, group, complex_rotary=not tuning.compile)
    if tuning.compile:
        # Block by block: two kinds are compiled, not 57 copies. Numbers of rows and tokens are symbolic, so that one
        # graph serves every batch without padding.
        # A setting of the process, since torch.compile itself takes no limit in torch 2.11.
        torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(fullgraph=True, dynamic=True, backend=tuning.compiler)
