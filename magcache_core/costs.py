"""What reuse costs, as measured on uncached runs: tables over segments, and the residuals' inner products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from magcache_core.resample import positions

COST_MODES = ("residual", "linear", "fitted")
"""Reuse modes that calibration measures a table for."""


@dataclass(frozen=True, eq=False)
class CostTable:
    """Costs in latent space: the 2-norm over an image's packed latents, root mean square over calibration runs.

    A segment is one computed step ``a`` with the reused steps after it; ``g`` is the gap to the computed step before
    ``a`` (0 stands for "none", where an extrapolation falls back to plain reuse).

    Attributes:
        pairwise: by mode, (steps, gaps + 1, max_skip + 1); entry [a, g, l] is |delta sigma| at step a + l times the
            velocity error there when it reuses from a (and a - g).
        segments: by mode, same shape; entry [a, g, l] is how far the latents have moved from the uncached run's after
            all of a + 1 ... a + l reused: the norm of the summed error vectors, which may cancel.
        gram: (steps, steps), mean inner product per token of the residuals of two steps.
        sensitivity: (steps,), how much a displacement of the latents made at a step has grown by the end of the run.
        velocities: (steps, steps), mean inner product per image of the velocities of two steps, those that true CFG
            made where it ran; None when not measured.

    Entries that don't exist (past the last step, gaps larger than a) are infinite; l = 0 costs nothing.
    """

    pairwise: Mapping[str, torch.Tensor]
    segments: Mapping[str, torch.Tensor]
    gram: torch.Tensor
    sensitivity: torch.Tensor
    velocities: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        """Steps of the measured runs."""
        return self.gram.shape[0]

    @property
    def max_skip(self) -> int:
        """Longest measured segment, in reused steps."""
        return self.segments["residual"].shape[2] - 1

    def longest(self, steps: int) -> int:
        """The longest segment of a run of ``steps`` steps, in reused steps, that spans no more than a measured one."""
        return self.max_skip * (steps - 1) // max(self.steps - 1, 1)

    def tail(self, first: int) -> CostTable:
        """The costs of a run that begins at step ``first``; segments are kept to the lengths that fit into it."""
        steps = self.steps - first
        reach = min(self.max_skip, steps - 1)

        def cut(tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kept = {mode: table[first:, : reach + 2, : reach + 1].clone() for mode, table in tables.items()}
            for table in kept.values():  # the new first step has nothing before it to extrapolate from
                table[0, 0] = kept["residual"][0, 0]
            return kept

        return CostTable(
            cut(self.pairwise),
            cut(self.segments),
            self.gram[first:, first:],
            self.sensitivity[first:],
            None if self.velocities is None else self.velocities[first:, first:],
        )

    def nearest_mode(self, mode: str) -> str:
        """The measured mode that stands for ``mode``: itself, or plain reuse."""
        return mode if mode in self.segments else "residual"

    @lru_cache(maxsize=64)  # noqa: B019  profiles live as long as the process
    def resampled(self, mode: str, steps: int, lengths: int) -> torch.Tensor:
        """Segment costs of a run of ``steps`` steps, (steps, lengths + 1, lengths), by trilinear interpolation.

        A segment's cost is how far the latents drift over a stretch of noise levels, so it is a function of where the
        stretch begins and how long it and the gap are, measured in the calibrated run's steps. Segments longer than
        the measured ones are infinite.
        """
        scale = (self.steps - 1) / max(steps - 1, 1)
        shape = (steps, lengths + 1, lengths)
        a, g, length = (torch.arange(size).view([-1 if i == axis else 1 for i in range(3)]).expand(shape)
                        for axis, size in enumerate(shape))  # fmt: skip
        gap = torch.where(g == 0, 0.0, (g * scale).clamp(min=1.0, max=self.max_skip + 1))
        result = _trilinear(_extended(self.segments[mode]), a * scale, gap, length * scale)
        exists = (g <= a) & ((g > 0) | (a == 0)) & (a + length <= steps - 1) & (length <= self.longest(steps))
        return torch.where(exists, result, torch.inf)

    @lru_cache(maxsize=64)  # noqa: B019
    def final(self, mode: str, steps: int, lengths: int) -> torch.Tensor:
        """`resampled` costs carried on to the end of the run: each times the mean sensitivity of its reused steps."""
        at = torch.tensor(positions(steps, self.steps))
        low = at.floor().long().clamp(max=self.steps - 1)
        high = (low + 1).clamp(max=self.steps - 1)
        growth = self.sensitivity[low] + (at - low) * (self.sensitivity[high] - self.sensitivity[low])
        ahead = torch.cat([growth[1:], growth[-1:].expand(lengths)]).unfold(0, lengths, 1)[:steps, : lengths - 1]
        means = ahead.cumsum(dim=1) / torch.arange(1, lengths)
        factor = torch.cat([torch.ones(steps, 1), means], dim=1)  # (steps, lengths)
        return self.resampled(mode, steps, lengths) * factor[:, None, :]

    def to_document(self) -> dict[str, Any]:
        """Plain lists for JSON: existing entries only, four significant digits."""
        return {
            "max_skip": self.max_skip,
            "pairwise": {mode: _ragged(mode, table) for mode, table in self.pairwise.items()},
            "segments": {mode: _ragged(mode, table) for mode, table in self.segments.items()},
            "gram": [[_short(value) for value in row] for row in self.gram.tolist()],
            "sensitivity": [_short(value) for value in self.sensitivity.tolist()],
            "velocities": None if self.velocities is None else self.velocities.tolist(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], steps: int) -> CostTable:
        """Read what `to_document` wrote; ValueError when sizes don't fit ``steps``."""
        max_skip = int(document["max_skip"])
        gram = torch.tensor(document["gram"], dtype=torch.float64)
        if gram.shape != (steps, steps):
            raise ValueError(f"costs.gram has shape {tuple(gram.shape)}, not {(steps, steps)}")
        velocities = document.get("velocities")
        if velocities is not None:
            velocities = torch.tensor(velocities, dtype=torch.float64)
            if velocities.shape != (steps, steps):
                raise ValueError(f"costs.velocities has shape {tuple(velocities.shape)}, not {(steps, steps)}")
        sensitivity = torch.tensor(document["sensitivity"])
        if sensitivity.shape != (steps,):
            raise ValueError(f"costs.sensitivity has {len(sensitivity)} values for {steps} steps")
        tables = {
            kind: {mode: _dense(mode, document[kind][mode], steps, max_skip) for mode in COST_MODES}
            for kind in ("pairwise", "segments")
        }
        return cls(tables["pairwise"], tables["segments"], gram, sensitivity, velocities)


def empty_table(steps: int, max_skip: int) -> torch.Tensor:
    """A table with every entry infinite but l = 0, which costs nothing; (steps, max_skip + 2, max_skip + 1)."""
    table = torch.full((steps, max_skip + 2, max_skip + 1), torch.inf)
    table[:, :, 0] = 0.0
    return table


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _ragged(mode: str, table: torch.Tensor) -> list[list[list[float]]]:
    """[a][g][l - 1] without the infinite entries; plain reuse doesn't depend on g and is written for g = 0 only."""
    return [
        [
            [float(f"{v:.4g}") for v in row[1:] if v != float("inf")]
            for row in rows[: 1 if mode == "residual" else a + 1]
        ]
        for a, rows in enumerate(table.tolist())
    ]


def _dense(mode: str, ragged: list[list[list[float]]], steps: int, max_skip: int) -> torch.Tensor:
    table = empty_table(steps, max_skip)
    if len(ragged) != steps:
        raise ValueError(f"a cost table has {len(ragged)} rows for {steps} steps")
    for a, rows in enumerate(ragged):
        for g, row in enumerate(rows):
            table[a, slice(None) if mode == "residual" else g, 1 : len(row) + 1] = torch.tensor(row)
    return table


def _extended(table: torch.Tensor) -> torch.Tensor:
    """Infinite entries replaced by their nearest finite neighbour, so that interpolation near the edge stays finite."""
    table = table.clone()
    for axis in (2, 1):
        for i in range(1, table.shape[axis]):
            here, before = table.select(axis, i), table.select(axis, i - 1)
            here[torch.isinf(here)] = before[torch.isinf(here)]
    return table


def _trilinear(table: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
    low = [p.floor().long().clamp(max=size - 1) for p, size in zip(at, table.shape, strict=True)]
    high = [(i + 1).clamp(max=size - 1) for i, size in zip(low, table.shape, strict=True)]
    part = [p - i for p, i in zip(at, low, strict=True)]
    total = torch.zeros_like(at[0])
    for corner in range(8):
        weight = torch.ones_like(total)
        index = []
        for axis in range(3):
            upper = bool(corner >> axis & 1)
            index.append(high[axis] if upper else low[axis])
            weight = weight * (part[axis] if upper else 1 - part[axis])
        total += weight * table[index[0], index[1], index[2]]
    return total
