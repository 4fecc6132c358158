"""Which parts of an image are painted anew: what a mask's file says of them, or the image's own transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image

from app.messages.conditioning import PAINTED


def mask_of(colours: Image.Image, alpha: Image.Image | None) -> np.ndarray:
    """The mask in a file: its transparent parts, as OpenAI has it; in a file without any, the white ones.

    Returns:
        (height, width), uint8, painted from `PAINTED` on.
    """
    holes = holes_of(alpha)
    return np.asarray(colours.convert("L")) if holes is None else holes


def holes_of(alpha: Image.Image | None) -> np.ndarray | None:
    """The transparent parts of an image as a mask, (height, width), uint8; None when nothing is transparent enough."""
    if alpha is None:
        return None
    holes = 255 - np.asarray(alpha)
    return holes if holes.max() >= PAINTED else None


def closed(image: Image.Image) -> Image.Image:
    """An RGBA image as RGB: where it is transparent, the colours around.

    What is left below transparency, white or black as a rule, would show at the edges of what is painted there.
    """
    layer = image.copy()
    layer.putalpha(layer.getchannel("A").point(lambda opacity: 0 if opacity <= 255 - PAINTED else opacity))
    return _over_its_half(layer).convert("RGB")


def _over_its_half(layer: Image.Image) -> Image.Image:
    """An RGBA image over itself in half its size, and that over its half, until nothing shows through; opaque."""
    width, height = layer.size
    if width * height == 1:
        below = Image.new("RGBA", (1, 1), "white")
    else:
        # Pillow weighs colours by their opacity here. What is opaque in part keeps its colour and becomes opaque.
        half = layer.resize(((width + 1) // 2, (height + 1) // 2), Image.Resampling.BOX)
        half.putalpha(half.getchannel("A").point(lambda opacity: min(4 * opacity, 255)))
        below = _over_its_half(half).resize(layer.size, Image.Resampling.BILINEAR)
    return Image.alpha_composite(below, layer)
