"""Linears that add low-rank adapters to what they compute, a different one for each group of rows of a batch.

The product with the base weight is shared by all rows, and each group's low-rank part is added to its own rows (as
S-LoRA, arXiv 2311.03285, and Punica, arXiv 2310.18547, do for language models): rows without one are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from app.engine.parallel import RowParallelLinear


@dataclass(frozen=True)
class Piece:
    """An adapter's part for outputs ``begin`` to ``end`` of a linear on this rank.

    Attributes:
        down: (rank, in_features), this rank's share where the linear's inputs are split.
        up: (end - begin, rank), this rank's share where its outputs are split.
    """

    begin: int
    end: int
    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: its pieces by number of the linear, see `adapt`."""

    pieces: Mapping[int, Sequence[Piece]]

    @property
    def nbytes(self) -> int:
        """Memory of its weights on this rank."""
        return sum(piece.down.nbytes + piece.up.nbytes for pieces in self.pieces.values() for piece in pieces)


@dataclass(frozen=True, eq=False)
class RowAdapters:
    """The adapters of one row, each with its scale, which add up."""

    scaled: tuple[tuple[Adapter, float], ...]


@dataclass(frozen=True)
class _Group:
    rows: slice
    scaled: tuple[tuple[Adapter, float], ...]


@dataclass
class _Batch:
    """The rows that the linears work on; code is compiled for each value of ``adapted``, so that it stands apart."""

    groups: tuple[_Group, ...] = ()
    adapted: bool = False


_BATCH = _Batch()
"""A process runs one forward pass at a time."""


@contextmanager
def applied(rows: Sequence[RowAdapters | None]) -> Iterator[None]:
    """Within it, row i of what goes through `adapt`'s linears has the adapters ``rows[i]``.

    Where all have the same, they may be any number of rows, such as the steps of one image.
    """
    before = _BATCH.groups, _BATCH.adapted
    _BATCH.groups = _grouped([() if row is None else row.scaled for row in rows])
    _BATCH.adapted = bool(_BATCH.groups)
    try:
        yield
    finally:
        _BATCH.groups, _BATCH.adapted = before


def _grouped(rows: Sequence[tuple[tuple[Adapter, float], ...]]) -> tuple[_Group, ...]:
    groups = []
    end = 0
    for scaled, same in groupby(rows):
        begin, end = end, end + len(list(same))
        if scaled:
            whole = end - begin == len(rows)
            groups.append(_Group(slice(None) if whole else slice(begin, end), scaled))
    return tuple(groups)


@torch.library.custom_op("flux_magcache::add_low_rank", mutates_args=["output"])
def _add_low_rank(output: torch.Tensor, input: torch.Tensor, number: torch.Tensor) -> None:
    """Add what the rows' adapters have for the linear ``number`` to ``output``; one call to the compiler."""
    site = int(number)
    for group in _BATCH.groups:
        for adapter, scale in group.scaled:
            for piece in adapter.pieces.get(site, ()):
                given = input[group.rows].reshape(-1, input.shape[-1])
                made = output[group.rows].view(-1, output.shape[-1])[:, piece.begin : piece.end]
                made.addmm_(given @ piece.down.T, piece.up.T, alpha=scale)


class _Adapted:
    """Mixed into a linear that has all inputs of its outputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(rows, ..., in_features) -> (rows, ..., out_features)."""
        output: torch.Tensor = super().forward(input)  # type: ignore[misc]
        if _BATCH.adapted:
            _add_low_rank(output, input, self.number)  # type: ignore[attr-defined]
        return output


class _AdaptedPartial:
    """Mixed into a linear whose inputs are split: each rank's low-rank part joins the sum that there is anyway."""

    def partial(self, input: torch.Tensor) -> torch.Tensor:
        """See `RowParallelLinear.partial`."""
        output: torch.Tensor = super().partial(input)  # type: ignore[misc]
        if _BATCH.adapted:
            _add_low_rank(output, input, self.number)  # type: ignore[attr-defined]
        return output


def adapt(transformer: nn.Module, linears: Sequence[str]) -> None:
    """Make linears of a loaded shard add the adapters of `applied`, in place; they are numbered as in ``linears``."""
    kinds: dict[type, type] = {}  # one class for all of a kind, so that what is compiled for one serves the others
    for number, name in enumerate(linears):
        linear: Any = transformer.get_submodule(name)
        kind = type(linear)
        mixin = _AdaptedPartial if issubclass(kind, RowParallelLinear) else _Adapted
        linear.__class__ = kinds.setdefault(kind, type(f"Adapted{kind.__name__}", (mixin, kind), {}))
        # On the CPU, where it can be read without waiting for a device; a plain integer would be compiled in.
        linear.register_buffer("number", torch.tensor(number, device="cpu"), persistent=False)
