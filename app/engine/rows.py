"""State of the rows on a rank between steps: latents, conditioning and residuals of the CFG branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from app.engine.geometry import Geometry
from app.messages import BranchStep, DenoiseJob

BatchKey = tuple[Geometry, int, tuple[Geometry, ...]]
"""An image's geometry, its number of text tokens, and the geometries of its reference images."""


@dataclass
class Branch:
    """One CFG branch of a row.

    Attributes:
        context: (text_tokens, inner_dim), the embedded prompt, the same at every step.
        modulation: by step that computes, (columns,), what scales, shifts and gates the blocks' streams there; known
            when the row is admitted, since it depends on noise level, guidance and pooled prompt only.
        output_modulation: (steps to run, 2 inner_dim), what scales and shifts the blocks' output at every step.
        residuals: the block stack's last outputs minus its inputs, newest first, each (image_tokens, inner_dim).
    """

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
        latents: (image_tokens, channels), packed.
        sigmas: (steps to run + 1,), float32, on the rank's device.
        references: (reference tokens, inner_dim), the embedded reference images one after another; they are the same
            at every step, so they are embedded once. Empty for most images.
        reference_geometries: of the images in ``references``.
    """

    job: DenoiseJob
    geometry: Geometry
    latents: torch.Tensor
    sigmas: torch.Tensor
    branches: dict[str, Branch]
    references: torch.Tensor
    reference_geometries: tuple[Geometry, ...]

    @property
    def batch_key(self) -> BatchKey:
        """Rows with equal keys have equal tensor shapes and position ids, and can share a forward pass."""
        return self.geometry, next(iter(self.branches.values())).context.shape[0], self.reference_geometries

    @property
    def residual_bytes(self) -> int:
        """Memory that the stored residuals take."""
        return sum(r.nbytes for branch in self.branches.values() for r in branch.residuals)
