"""The number of tokens of an image."""

from __future__ import annotations

from dataclasses import dataclass

TOKEN_PIXELS = 16
"""Pixels per image token side: FLUX's autoencoders halve the image three times, and a token packs 2 x 2 latents."""
LATENT_PIXELS = TOKEN_PIXELS // 2
"""Pixels per latent side."""


@dataclass(frozen=True, order=True)
class Geometry:
    """Image tokens of an image: ``rows`` x ``columns``, each standing for 16 x 16 pixels."""

    rows: int
    columns: int

    @classmethod
    def of(cls, width: int, height: int) -> Geometry:
        """The geometry of an image of ``width`` x ``height`` pixels, both multiples of 16."""
        return cls(height // TOKEN_PIXELS, width // TOKEN_PIXELS)

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.rows * self.columns
