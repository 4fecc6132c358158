"""State of the rows on a rank between steps: latents, conditioning and residuals of the CFG branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from app.engine.geometry import Geometry
from app.engine.inpainting import Inpainting
from app.engine.lora_linears import RowAdapters
from app.messages.jobs import DenoiseJob
from app.messages.plans import BranchStep
from magcache_core.row_sums import RowMeasurement, guided
from magcache_core.run_sums import BranchSums

BatchKey = tuple[Geometry, int, tuple[Geometry, ...]]
"""An image's geometry, its number of text tokens, and the geometries of its reference images."""


@dataclass
class Branch:
    """One CFG branch of a row.

    Attributes:
        text_tokens: of the prompt.
        context: (text_tokens, inner_dim), the embedded prompt, the same at every step; this rank's part of the tokens.
        modulation: by step that computes, (columns,), what scales, shifts and gates the blocks' streams there; known
            when the row is admitted, since it depends on noise level, guidance and pooled prompt only.
        output_modulation: (steps to run, 2 inner_dim), what scales and shifts the blocks' output at every step.
        residuals: the block stack's last outputs minus its inputs, newest first, each (image_tokens, inner_dim), this
            rank's part of the tokens.
    """

    text_tokens: int
    context: torch.Tensor
    modulation: Mapping[int, torch.Tensor]
    output_modulation: torch.Tensor
    residuals: deque[torch.Tensor] = field(default_factory=deque)

    def modulation_at(self, step: int) -> torch.Tensor:
        """The modulation of a step that computes, (columns,).

        Raises:
            LookupError: the row was admitted without this step among those that compute.
        """
        if step not in self.modulation:
            raise LookupError(f"step {step} computes, and the row was admitted with {sorted(self.modulation)} only")
        return self.modulation[step]

    def store(self, residual: torch.Tensor, residuals_kept: int) -> None:
        """Keep ``residual`` as the newest of at most ``residuals_kept``."""
        self.residuals.appendleft(residual)
        while len(self.residuals) > residuals_kept:
            self.residuals.pop()

    def reuse(self, row_id: str, step: BranchStep) -> torch.Tensor:
        """The weighted sum of stored residuals, (image_tokens, inner_dim).

        Raises:
            LookupError: the plan reuses a residual that this row does not hold.
        """
        if not 0 < len(step.weights) <= len(self.residuals):
            raise LookupError(
                f"row {row_id} ({step.branch}) has {len(self.residuals)} residuals, the plan reuses {len(step.weights)}"
            )
        if step.weights == (1.0,):
            return self.residuals[0]
        total = self.residuals[0] * step.weights[0]
        for residual, weight in zip(list(self.residuals)[1:], step.weights[1:], strict=False):
            total.add_(residual, alpha=weight)
        return total


@dataclass
class Row:
    """One image under way.

    Attributes:
        number: of the row among all that were admitted.
        latents: (image_tokens, channels), packed.
        sigmas: (steps to run + 1,), float32, on the rank's device.
        references: (reference tokens, inner_dim), the embedded reference images one after another; they are the same
            at every step, so they are embedded once; this rank's part of the tokens. Empty for most images.
        reference_geometries: of the images in ``references``.
        velocities: the last computed guided velocities, newest first, each (image_tokens, channels), of a row that
            predicts and corrects them.
        inpainting: what the row keeps of its source, None where all of it is painted.
        adapters: low-rank ones of the transformer, None for none.
        measurement: what is measured of the run, where it is recorded; on rank 0 only, which has all that there is.
    """

    job: DenoiseJob
    number: int
    geometry: Geometry
    latents: torch.Tensor
    sigmas: torch.Tensor
    branches: dict[str, Branch]
    references: torch.Tensor
    reference_geometries: tuple[Geometry, ...]
    inpainting: Inpainting | None = None
    adapters: RowAdapters | None = None
    measurement: RowMeasurement | None = None
    velocities: deque[torch.Tensor] = field(default_factory=deque)

    @property
    def batch_key(self) -> BatchKey:
        """Rows with equal keys have equal tensor shapes and position ids, and can share a forward pass."""
        return self.geometry, next(iter(self.branches.values())).text_tokens, self.reference_geometries

    def owner(self, branch: str, copies: int) -> int:
        """Which of the shard's ``copies`` runs a CFG branch of this row, at every step.

        A recorded row stays with the first, which has rank 0: it measures.
        """
        if self.job.is_recorded:
            return 0
        return (self.number + list(self.branches).index(branch)) % copies

    @property
    def residual_bytes(self) -> int:
        """Memory that the stored residuals and velocities take."""
        residuals = sum(r.nbytes for branch in self.branches.values() for r in branch.residuals)
        measured = 0 if self.measurement is None else self.measurement.nbytes
        return residuals + measured + sum(velocity.nbytes for velocity in self.velocities)

    @property
    def sums(self) -> dict[str, BranchSums]:
        """What was measured of a finished run, by branch; empty where it was not recorded."""
        return {} if self.measurement is None else self.measurement.sums

    def guided(self, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The branches' velocities as one, by true CFG where there are two."""
        return guided(velocities, self.job.true_cfg_scale)

    def blended(self, latents: torch.Tensor, level: int) -> torch.Tensor:
        """``latents``, outside the mask the source at the noise level before step ``level``; -1 is without noise."""
        return latents if self.inpainting is None else self.inpainting.blend(latents, self.sigmas[level])

    def keep(self, velocity: torch.Tensor, kept: int) -> None:
        """Keep ``velocity`` (image_tokens, channels) as the newest of at most ``kept``."""
        self.velocities.appendleft(velocity)
        while len(self.velocities) > kept:
            self.velocities.pop()

    def displaced(self, weights: Sequence[float]) -> torch.Tensor:
        """The latents and the weighted sum of stored velocities, (image_tokens, channels) in float32.

        Raises:
            LookupError: the plan weighs other velocities than this row holds.
        """
        if len(weights) != len(self.velocities):
            raise LookupError(
                f"row {self.job.row_id} has {len(self.velocities)} velocities, the plan weighs {len(weights)}"
            )
        total = self.latents.float()
        for weight, velocity in zip(weights, self.velocities, strict=True):
            total = total + weight * velocity.float()
        return total
