"""The size in which a model takes the source image of an edit."""

from __future__ import annotations

import math

from PIL import Image

from app.engine.families import Edits, Family
from app.engine.geometry import TOKEN_PIXELS

REFERENCE_PIXELS = 1024 * 1024
"""Larger reference images are scaled down to this, as diffusers' pipelines do."""


def fit_source(image: Image.Image, family: Family, width: int, height: int, max_pixels: int) -> Image.Image:
    """``image`` as the model takes it; one that has been fitted stays as it is.

    Args:
        width, height: pixels of the image to make, the size of a source for ``strength``.
        max_pixels: bounds a reference image, and with it the tokens that every step reads; above a megapixel without
            effect.
    """
    if family.edits is Edits.STRENGTH:
        return _resized(image, (width, height))
    limit = min(max_pixels, REFERENCE_PIXELS)
    if not family.trained_sizes:
        return within_area(image, limit)
    sizes = [trained_size(size, limit) for size in family.trained_sizes]
    if image.size in sizes:  # scaling may have changed its shape, so that another is nearer now
        return image
    return _resized(image, nearest_trained_size(family.trained_sizes, *image.size, limit))


def nearest_trained_size(
    trained: tuple[tuple[int, int], ...], width: int, height: int, max_pixels: int
) -> tuple[int, int]:
    """The (width, height) of ``trained`` nearest in shape, scaled to ``max_pixels`` where that is below a megapixel."""
    shape = width / height
    _, near_width, near_height = min((abs(shape - w / h), w, h) for w, h in trained)
    return trained_size((near_width, near_height), max_pixels)


def trained_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """A (width, height) of the training, scaled to ``max_pixels`` where that is below a megapixel."""
    scale = min(1.0, math.sqrt(max_pixels / REFERENCE_PIXELS))
    return _whole_tokens(size[0] * scale), _whole_tokens(size[1] * scale)


def within_area(image: Image.Image, max_pixels: int) -> Image.Image:
    """``image`` scaled down to ``max_pixels`` if it has more, then cropped around its middle to whole tokens."""
    if image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        image = _resized(image, (int(image.width * scale), int(image.height * scale)))
    width, height = _whole_tokens(image.width), _whole_tokens(image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def _whole_tokens(pixels: float) -> int:
    return max(int(pixels) // TOKEN_PIXELS, 1) * TOKEN_PIXELS
