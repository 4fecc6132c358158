"""What calibration sums up over uncached runs with all their CFG branches.

Each branch is measured by itself (`magcache_core.run_sums`). Under true CFG the latents are moved by the velocity that
both branches make together, which is what is predicted and corrected, and what a displacement is measured by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from magcache_core.run_sums import BranchSums, RunMeasurement


@dataclass(frozen=True, eq=False)
class MeasuredStep:
    """What one branch computed at a step; see `RunMeasurement.add`."""

    residual: torch.Tensor
    velocity: torch.Tensor
    replay: Callable[[torch.Tensor], torch.Tensor]


def guided(branches: Sequence[torch.Tensor], true_cfg_scale: float) -> torch.Tensor:
    """The branches' velocities, or what these are multiplied by alike, as true CFG combines them; one is as it is."""
    if len(branches) == 1:
        return branches[0]
    conditional, negative = branches
    return negative + true_cfg_scale * (conditional - negative)


class RowMeasurement:
    """One uncached run, measured while it runs; `sums` are whole after its last step."""

    def __init__(
        self,
        sigmas: Sequence[float],
        branches: Sequence[str],
        true_cfg_scale: float = 1.0,
        grams: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            sigmas: noise level of each step and the final one, falling, steps + 1 values.
            branches: names of the CFG branches; of two the first is the conditional one.
            true_cfg_scale: of two branches.
            grams: by branch, those of the runs before; see `RunMeasurement`.
        """
        known = grams or {}
        self._runs = {name: RunMeasurement(sigmas, gram=known.get(name)) for name in branches}
        self._scale = true_cfg_scale
        self._moved: list[float] = []

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that it keeps."""
        return sum(run.nbytes for run in self._runs.values())

    @property
    def sums(self) -> dict[str, BranchSums]:
        """The sums of this run by branch; ValueError before its last step."""
        moved = torch.tensor(self._moved, dtype=torch.float64)
        return {name: replace(run.sums, moved=moved) for name, run in self._runs.items()}

    @torch.no_grad()
    def add(self, steps: Sequence[MeasuredStep]) -> None:
        """Measure the next step; ``steps`` are the branches', in their order."""
        # Velocities are alike and differences between them count, so they are combined in double precision.
        velocities = [step.velocity if len(steps) == 1 else step.velocity.double() for step in steps]
        moving = guided(velocities, self._scale)
        for run, step in zip(self._runs.values(), steps, strict=True):
            run.add(step.residual, step.velocity, step.replay, moving)
        displacements = [run.displacement for run in self._runs.values()]
        known = [one for one in displacements if one is not None]
        self._moved.append(guided(known, self._scale).square().sum().item() if known else 0.0)
