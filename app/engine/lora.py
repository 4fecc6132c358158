"""The low-rank adapters of one rank: loaded and dropped by name, as the coordinator says, and held by their rows.

A rank keeps its slice: of ``up`` where the linear's outputs are split over the ranks, of ``down`` where its inputs are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from app.engine.fused import fuse
from app.engine.loading import meta_transformer
from app.engine.lora_files import LowRank, read_lora
from app.engine.lora_linears import Adapter, Piece, RowAdapters, adapt
from app.engine.lora_names import targets
from app.engine.parallel import TensorParallelGroup, local_ranges, parallelize, shard_specs
from app.messages.loras import LoraUse

WITHOUT = LoraUse("", 1.0)
"""An adapter that changes nothing, which is always there: a row with it runs as rows with adapters do."""


@dataclass(frozen=True)
class Site:
    """Where a rank has a linear of diffusers' transformer.

    Attributes:
        linear: the name of the one that it is, or is a part of.
        begin, end: its outputs there.
        dim: along which its weight is split over the ranks, 0 for outputs and 1 for inputs; None where it is whole.
        ranges: of that dimension, which this rank has.
    """

    linear: str
    begin: int
    end: int
    dim: int | None
    ranges: tuple[tuple[int, int], ...]

    def piece(self, low_rank: LowRank, device: torch.device, dtype: torch.dtype) -> Piece:
        """This rank's slice of an adapter."""
        down, up = low_rank.down, low_rank.up
        if self.dim == 0:
            up = torch.cat([up[begin:end] for begin, end in self.ranges])
        elif self.dim == 1:
            down = torch.cat([down[:, begin:end] for begin, end in self.ranges], dim=1)
        # Clones: a view would keep all of it in memory.
        return Piece(self.begin, self.end, *(one.to(device, dtype, copy=True) for one in (down, up)))


def sites(whole: nn.Module, group: TensorParallelGroup) -> dict[str, Site]:
    """Where this rank has each linear of ``whole``, by diffusers' name; ``whole``, on the meta device, is used up."""
    names = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    specs = shard_specs(whole, group.size)
    parallelize(whole, specs, group)
    outputs = {name: len(whole.get_parameter(f"{name}.weight")) for name in names}
    slots = fuse(whole)
    found = {}
    for name in names:
        spec, slot = specs.get(f"{name}.weight"), slots.get(f"{name}.weight")
        ranges = tuple(local_ranges(spec, group.rank, group.size))
        linear = slot.parameter.removesuffix(".weight") if slot else name
        begin, end = (slot.begin, slot.end) if slot else (0, outputs[name])
        found[name] = Site(linear, begin, end, spec.dim if spec and ranges else None, ranges)
    return found


class Loras:
    """What a rank has loaded of a folder; the transformer's linears add it to the rows that ask for it."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        transformer: nn.Module,
        group: TensorParallelGroup,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``transformer`` is this rank's shard of ``model``; its linears are changed in place (`adapt`).

        Args:
            folder: of adapters, ``NAME.safetensors`` each.
        """
        self._folder = folder
        self._device = device
        self._dtype = dtype
        whole = meta_transformer(model / "transformer")
        self._targets = targets(whole)
        self._sites = sites(whole, group)
        linears = sorted({site.linear for site in self._sites.values()})
        self._numbers = {name: number for number, name in enumerate(linears)}
        adapt(transformer, linears)
        self._loaded: dict[tuple[str, str], Adapter] = {WITHOUT.content: Adapter({})}

    @property
    def nbytes(self) -> int:
        """Memory of all that are loaded."""
        return sum(adapter.nbytes for adapter in list(self._loaded.values()))

    def load(self, name: str, digest: str = "") -> None:
        """Have the adapter ``name`` in memory. Another thread than the one that runs plans may do this meanwhile.

        Args:
            digest: what `app.engine.lora_files.lora_digest` of its file must be; empty for any. Under one name several
                may be loaded, since a file can be replaced while rows use what it held.

        Raises:
            LoraError: see `app.engine.lora_files.read_lora`.
        """
        if (name, digest) in self._loaded:
            return
        pieces: dict[int, list[Piece]] = defaultdict(list)
        read = read_lora(self._folder / f"{name}.safetensors", self._targets, digest)
        for linear, low_rank in read.items():
            site = self._sites[linear]
            pieces[self._numbers[site.linear]].append(site.piece(low_rank, self._device, self._dtype))
        self._loaded[name, digest] = Adapter(pieces)

    def drop(self, name: str, digest: str = "") -> None:
        """Forget an adapter, if it is loaded; its memory is free once no row holds it."""
        self._loaded.pop((name, digest), None)

    def hold(self, uses: Sequence[LoraUse]) -> RowAdapters | None:
        """The adapters of a row; None where it has none.

        Raises:
            LookupError: one is not loaded.
        """
        for use in uses:
            if use.content not in self._loaded:
                raise LookupError(f"the plan admits a row with the adapter {use.name!r}, which is not loaded")
        scaled = tuple((self._loaded[use.content], use.scale) for use in uses if use.scale)
        return RowAdapters(scaled) if scaled else None
