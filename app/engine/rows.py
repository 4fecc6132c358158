"""What a rank keeps between steps for each row: latents, conditioning and the residuals of its CFG branches."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from app.engine.messages import BranchStep, DenoiseJob
from app.engine.sampling import Geometry


@dataclass
class Branch:
    """One CFG branch of a row.

    Attributes:
        context: (text_tokens, inner_dim), the embedded prompt; it is the same at every step, so it is embedded once.
        pooled: (pooled_projection_dim,).
        residuals: the block stack's last outputs minus its inputs, newest first, each (image_tokens, inner_dim).
    """

    context: torch.Tensor
    pooled: torch.Tensor
    residuals: deque[torch.Tensor] = field(default_factory=deque)

    def store(self, residual: torch.Tensor, history: int) -> None:
        """Keep ``residual`` as the newest of at most ``history``."""
        self.residuals.appendleft(residual)
        while len(self.residuals) > history:
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
    """One picture under way.

    Attributes:
        latents: (image_tokens, channels), packed.
        sigmas: (steps + 1,), float32, on the rank's device.
        timesteps: (steps,), ``sigmas`` in the transformer's dtype, as FluxPipeline rounds them.
        guidance: (), float32, on the rank's device.
    """

    job: DenoiseJob
    geometry: Geometry
    latents: torch.Tensor
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    guidance: torch.Tensor
    branches: dict[str, Branch]

    @property
    def batch_key(self) -> tuple[Geometry, int]:
        """Rows with equal keys have equal tensor shapes and can share a forward pass."""
        return self.geometry, next(iter(self.branches.values())).context.shape[0]

    @property
    def residual_bytes(self) -> int:
        """Memory that the stored residuals take."""
        return sum(r.nbytes for branch in self.branches.values() for r in branch.residuals)
