"""Source images of edits: resized as the model expects, then encoded by the VAE into tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from app.engine.families import Edits, Family
from app.engine.geometry import TOKEN_PIXELS
from app.messages import SourceImage

REFERENCE_PIXELS = 1024 * 1024
"""Larger reference images are scaled down to this, as diffusers' pipelines do."""


class SourceEncoder:
    """Encodes images with a given VAE; threads and devices are the caller's business."""

    def __init__(self, vae: Any, family: Family, max_pixels: int = REFERENCE_PIXELS) -> None:
        """``max_pixels`` bounds a reference image, and with it the tokens that every step reads."""
        self._vae = vae
        self._family = family
        self._max_pixels = min(max_pixels, REFERENCE_PIXELS)
        self._processor = VaeImageProcessor(do_resize=False)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, width: int, height: int) -> SourceImage:
        """The tokens of one source image, on the CPU.

        The mode of the VAE's posterior is taken, not a sample: so the seed decides the noise only, and the ``n`` images
        of a request share one source.

        Args:
            pixels: (height, width, 3), uint8, of any size.
            width, height: pixels of the image to make, the size of a source for ``strength``.
        """
        image = Image.fromarray(pixels)
        if self._family.edits is Edits.STRENGTH:
            fitted = image.resize((width, height), Image.Resampling.LANCZOS)
        elif self._family.trained_sizes:
            size = nearest_trained_size(self._family.trained_sizes, *image.size, self._max_pixels)
            fitted = image.resize(size, Image.Resampling.LANCZOS)
        else:
            fitted = within_area(image, self._max_pixels)
        batch = self._processor.preprocess(fitted).to(self._vae.device, self._vae.dtype)  # (1, 3, height, width)
        tokens = self._family.layout.from_vae(self._vae, self._vae.encode(batch).latent_dist.mode())
        return SourceImage(tokens[0].cpu(), *fitted.size)


def nearest_trained_size(
    trained: tuple[tuple[int, int], ...], width: int, height: int, max_pixels: int
) -> tuple[int, int]:
    """The (width, height) of ``trained`` nearest in shape, scaled to ``max_pixels`` where that is below a megapixel."""
    shape = width / height
    _, near_width, near_height = min((abs(shape - w / h), w, h) for w, h in trained)
    scale = min(1.0, math.sqrt(max_pixels / REFERENCE_PIXELS))
    return _whole_tokens(near_width * scale), _whole_tokens(near_height * scale)


def within_area(image: Image.Image, max_pixels: int) -> Image.Image:
    """``image`` scaled down to ``max_pixels`` if it has more, then cropped around its middle to whole tokens."""
    if image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        size = int(image.width * scale), int(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = _whole_tokens(image.width), _whole_tokens(image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _whole_tokens(pixels: float) -> int:
    return max(int(pixels) // TOKEN_PIXELS, 1) * TOKEN_PIXELS
