"""The forward pass of rows of equal shapes, from latents to velocities: tensors in, tensors out.

Nothing else goes in, so a pass of given sizes can be recorded once and replayed (`app.engine.graphs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from app.engine.modulation import Modulation
from app.engine.sequence import SequenceParallelGroup
from magcache_core.strategies import MagCacheStrategy, Rotary


@dataclass(frozen=True)
class Forward:
    """The passes of a step that computes and of one that reuses, on this rank's shard and its part of the tokens."""

    transformer: Any
    strategy: MagCacheStrategy
    modulation: Modulation
    sequence: SequenceParallelGroup

    def computed(
        self,
        rotary: Rotary,
        latents: torch.Tensor,
        context: torch.Tensor,
        references: torch.Tensor,
        modulation: torch.Tensor,
        output_modulation: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block stack.

        Args:
            rotary: positions of this rank's tokens.
            latents: (rows, image_tokens, channels), all tokens.
            context: (rows, text_tokens, inner_dim), this rank's tokens.
            references: (rows, reference tokens, inner_dim), this rank's; there may be none.
            modulation: (rows, columns) of `Modulation.ahead`.
            output_modulation: (rows, 2 inner_dim).

        Returns:
            The velocities, (rows, image_tokens, channels), equal on all ranks; and what the blocks added to their
            input, (rows, this rank's image tokens, inner_dim).
        """
        hidden = self._embedded(latents)
        tokens = torch.cat([hidden, references], dim=1) if references.shape[1] else hidden
        output = self.strategy.blocks(self.transformer, tokens, context, self.modulation.by_block(modulation), rotary)
        # References are read by the image and produce nothing themselves: their part of the output is dropped.
        output = output[:, : hidden.shape[1]]
        return self._projected(output, output_modulation, latents.shape[1]), output - hidden

    def reused(
        self, latents: torch.Tensor, residual: torch.Tensor, output_modulation: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The velocities with ``residual`` in place of what the blocks would add; shapes as in `computed`."""
        hidden = self._embedded(latents)
        return (self._projected(hidden + residual, output_modulation, latents.shape[1]),)

    def _embedded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.strategy.embed_image(self.transformer, self.sequence.part(latents))

    def _projected(self, output: torch.Tensor, modulation: torch.Tensor, tokens: int) -> torch.Tensor:
        return self.sequence.gather(self.strategy.project(self.transformer, output, modulation), tokens)
