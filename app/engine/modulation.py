"""What scales, shifts and gates the blocks' streams, computed when a row is admitted instead of at every step.

A block's modulation (AdaLN, Peebles and Xie, arXiv 2212.09748) depends on noise level, guidance and pooled prompt only.
All of them are known at admission, and so is which steps compute: one product with a row per computed step takes the
place of one per step, each of which would read all of these weights (6.6 GB of FLUX.1's 23.8). What remains in the
blocks is a look-up, so the weights need not lie whole on every rank, nor on the GPU at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from app.engine.parallel import TensorParallelGroup, modulation_linears

KEPT_BYTES = 1 << 27
"""Of `Recent`: FLUX.1-dev's modulation of some sixty computed steps, FLUX.2's of thousands."""


@dataclass(frozen=True)
class BranchModulation:
    """What modulates one CFG branch of a row.

    Attributes:
        blocks: by step that computes, (columns,), for the blocks' streams.
        output: (steps to run, 2 inner_dim), what scales and shifts the blocks' output at every step.
    """

    blocks: Mapping[int, torch.Tensor]
    output: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.output.nbytes + sum(one.nbytes for one in self.blocks.values())


class Recent:
    """The modulation used last, for further images of the same prompt and settings; at most `KEPT_BYTES`.

    Where the model takes no pooled prompt, prompts are no part of it and all images of equal settings share one. Ranks
    admit the same rows in the same order, so they agree on what is there.
    """

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[Hashable, BranchModulation] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], BranchModulation]) -> BranchModulation:
        """What is there for ``key``, else what ``make`` gives."""
        found = self._kept.pop(key, None) or make()
        self._kept[key] = found
        while sum(one.nbytes for one in self._kept.values()) > self._limit:
            self._kept.popitem(last=False)
        return found


class LookUp(nn.Module):
    """In place of a modulation's linear: its columns of what was computed ahead."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self._begin, self._end = begin, end

    def forward(self, modulation: torch.Tensor) -> torch.Tensor:
        """(rows, the block's columns) -> (rows, this linear's columns)."""
        return modulation[:, self._begin : self._end]


class Modulation:
    """The modulation of a transformer's blocks; its linears are taken out of the transformer.

    Attributes:
        width: columns of all blocks together.
    """

    def __init__(self, transformer: Any, group: TensorParallelGroup, device: torch.device) -> None:
        """``transformer`` is loaded: with several ranks each holds its share of every linear's columns.

        Args:
            device: where the product is computed; weights that lie elsewhere are copied for it, one linear at a time.
        """
        self._group = group
        self._device = device
        self.width = 0
        self._linears: list[tuple[int, nn.Linear]] = []  # each with the first of its columns
        self._block_widths: list[int] = []
        for names in modulation_linears(transformer):
            first = self.width
            for name in names:
                owner = transformer.get_submodule(name.rpartition(".")[0])
                begin = self.width
                self.width += len(owner.linear.weight) * group.size
                self._linears.append((begin, owner.linear))
                owner.linear = LookUp(begin - first, self.width - first)
                for activation in ("silu", "act_fn"):
                    if hasattr(owner, activation):
                        setattr(owner, activation, nn.Identity())
            self._block_widths.append(self.width - first)

    def ahead(self, temb: torch.Tensor) -> torch.Tensor:
        """The modulation of steps, equal on all ranks: (steps, dim) of `embed_time` -> (steps, width)."""
        activated = F.silu(temb)
        modulation = temb.new_zeros(len(temb), self.width)
        for column, linear in self._linears:
            here = {name: tensor.to(self._device, non_blocking=True) for name, tensor in linear.named_parameters()}
            part: torch.Tensor = functional_call(linear, here, activated)
            begin = column + self._group.rank * part.shape[1]
            modulation[:, begin : begin + part.shape[1]] = part
        # Every column is one rank's and zero on the others: the sum puts them together, and rounds nothing.
        return self._group.sum(modulation)

    def by_block(self, modulation: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(rows, width) as the strategy's ``blocks`` takes it: a part per block, or whole where all share it."""
        return modulation.split(self._block_widths, dim=1) if len(self._block_widths) > 1 else modulation
