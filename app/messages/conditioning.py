"""What an image is made from: prompts as the text encoders read them, source images as latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

PAINTED = 128
"""A mask's pixels, 0 to 255, are painted from here on."""


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a prompt, and how many of them are read; ``clip`` is CLIP's own count, 0 where there is none."""

    given: int
    read: int
    clip_given: int = 0
    clip_read: int = 0


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt, encoded by the text encoders.

    Attributes:
        tokens: (text_tokens, joint_attention_dim), the output of T5 or Qwen3, padding included.
        pooled: (pooled_projection_dim,), the CLIP pooled output; None for FLUX.2, which has no such input.
        count: of the prompt's tokens.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None
    count: TokenCount = TokenCount(0, 0)


@dataclass(frozen=True)
class SourceImage:
    """An image that a request starts from or refers to, as latents of the VAE.

    Attributes:
        latents: (image_tokens, channels), packed and scaled as the model's diffusers pipeline does.
        width, height: pixels.
        mask: (height / 8, width / 8), bool, one for each latent of the VAE: True where inpainting paints, and elsewhere
            this image stays. None for images that are no source of inpainting.
    """

    latents: torch.Tensor
    width: int
    height: int
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """The tensors of one job; ``negative`` is set exactly when true CFG runs.

    ``sources`` are the images that an edit refers to (Kontext, klein), or the one that ``strength`` starts from.
    ``grams`` are, for a row that is recorded, the inner products of the residuals of the runs before, by branch; see
    `magcache_core.row_sums.RowMeasurement`.
    """

    prompt: PromptEmbeddings
    negative: PromptEmbeddings | None = None
    sources: tuple[SourceImage, ...] = ()
    grams: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def token_counts(self) -> tuple[TokenCount, ...]:
        """Of the prompt, and of the negative one if there is one."""
        return tuple(prompt.count for prompt in (self.prompt, self.negative) if prompt is not None)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        prompts = [prompt for prompt in (self.prompt, self.negative) if prompt is not None]
        tensors = [prompt.tokens for prompt in prompts] + [source.latents for source in self.sources]
        tensors += [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        tensors += [source.mask for source in self.sources if source.mask is not None]
        return sum(tensor.nbytes for tensor in tensors)
