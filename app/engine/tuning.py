"""How the transformer runs: attention kernels, compiled blocks, CUDA graphs, 8-bit weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.engine.attention import use_positions
from app.engine.attention_backends import AttentionBackend
from app.engine.fp8 import Quantization
from app.engine.sequence import SequenceParallelGroup

GRAPHS_PER_BLOCK = 16
"""A kind of block is compiled for the usual row, for one row and for several, and again where image and text happen to
have equally many tokens; many more graphs would be a mistake, and torch then stops."""


@dataclass(frozen=True)
class UsualRow:
    """The tokens of one row of the size that is expected most, without references."""

    image_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Both together, as attention sees them."""
        return self.image_tokens + self.text_tokens

    def part(self, group: SequenceParallelGroup) -> UsualRow:
        """What this rank of ``group`` has of it."""
        image, text = (group.part_sizes(count)[group.rank] for count in (self.image_tokens, self.text_tokens))
        return UsualRow(image, text)

    def is_alone(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> bool:
        """Whether a block's inputs, (rows, tokens, dim), are of one such row; a joint block has no second one."""
        rows, tokens = hidden_states.shape[:2]
        if encoder_hidden_states is None:
            return (rows, tokens) == (1, self.tokens)
        return (rows, tokens, encoder_hidden_states.shape[1]) == (1, self.image_tokens, self.text_tokens)


@dataclass(frozen=True)
class Tuning:
    """How the transformer runs.

    Attributes:
        attention_backend: kernels; ``auto`` is the fastest of those that rank 0 has, for ``usual``.
        compile: compile the blocks of the stack; their first run waits for it.
        quantization: ``fp8`` for the weights that tensor parallelism splits.
        modulation_on_host: keep the weights that only a row's admission needs in host memory.
        cuda_graphs: record the passes of the warm-up, and replay those of the same sizes.
        usual: what blocks are compiled for apart from all other numbers of rows and tokens.
        compile_cache: folder that keeps compiled kernels between starts; None leaves torch's.
        compiler: torch.compile's backend.
    """

    attention_backend: AttentionBackend = "auto"
    compile: bool = False
    quantization: Quantization | None = None
    modulation_on_host: bool = False
    cuda_graphs: bool = False
    usual: UsualRow = UsualRow(4096, 512)
    compile_cache: Path | None = None
    compiler: str = "inductor"


def tune(
    transformer: Any,
    tuning: Tuning,
    group: SequenceParallelGroup = SequenceParallelGroup(),  # noqa: B008 - frozen
) -> None:
    """Compile the blocks of a loaded shard, in place, or prepare them for running as they are."""
    use_positions(transformer, group, complex_rotary=not tuning.compile)
    if not tuning.compile:
        return
    # A setting of the process, since torch.compile itself takes no limit in torch 2.11.
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
    usual = tuning.usual.part(group)
    # Block by block: two kinds are compiled, not 57 copies.
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = _by_size(block.forward, usual, tuning.compiler)


def use_compile_cache(folder: Path, name: str) -> None:
    """Keep what this process compiles from now on in ``folder``, by ``name``: of an attention backend, or of the VAE.

    Compiled code is found again by the program that it was made of, in which attention is not yet one kernel or the
    other; torch's order of kernels is no part of it.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def _by_size(forward: Callable[..., Any], usual: UsualRow, compiler: str) -> Callable[..., Any]:
    """``forward`` compiled twice: for the usual row alone, with its sizes fixed, and with symbolic sizes for the rest.

    With numbers of rows and tokens symbolic, one graph serves every batch without padding.
    """
    fixed, symbolic = (
        torch.compile(forward, fullgraph=True, dynamic=dynamic, backend=compiler) for dynamic in (False, True)
    )

    def run(*, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None, **inputs: Any) -> Any:
        compiled = fixed if usual.is_alone(hidden_states, encoder_hidden_states) else symbolic
        return compiled(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **inputs)

    return run
