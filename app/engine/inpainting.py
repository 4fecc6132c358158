"""Inpainting: outside its mask an image has its source's latents, at every step under the step's share of noise.

What diffusers' ``FluxInpaintPipeline`` does after each Euler step. The mask is binary, so what is painted and what is
kept never mix: a velocity may move the latents over several steps at once, and be corrected later, as anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from app.engine.layouts import pack
from app.engine.sampling import mix_noise


@dataclass(frozen=True)
class Inpainting:
    """What a row keeps of its source.

    Attributes:
        source: (image_tokens, channels), packed.
        noise: what the row started from, likewise.
        painted: (image_tokens, channels), bool: where the row's own latents stay.
    """

    source: torch.Tensor
    noise: torch.Tensor
    painted: torch.Tensor

    @classmethod
    def of(cls, source: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> Inpainting:
        """``mask`` is (2 rows, 2 columns), bool, True where the image is painted; one for all channels."""
        channels = source.shape[-1] // 4
        painted = pack(mask.expand(1, channels, *mask.shape))[0]
        return cls(source, noise, painted.to(source.device))

    def blend(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """``latents`` where the mask paints, elsewhere the source with noise at level ``sigma``, a scalar."""
        return torch.where(self.painted, latents, mix_noise(self.source, self.noise, sigma).to(latents.dtype))
