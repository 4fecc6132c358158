"""Source images of edits: resized as the model expects, then encoded by the VAE into tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from app.engine.families import Family
from app.engine.geometry import LATENT_PIXELS
from app.engine.source_fit import REFERENCE_PIXELS, fit_source
from app.messages.conditioning import PAINTED, SourceImage


class SourceEncoder:
    """Encodes images with a given VAE; threads and devices are the caller's business."""

    def __init__(self, vae: Any, family: Family, max_pixels: int = REFERENCE_PIXELS) -> None:
        """``max_pixels`` bounds a reference image, and with it the tokens that every step reads."""
        self._vae = vae
        self._family = family
        self._max_pixels = max_pixels
        self._processor = VaeImageProcessor(do_resize=False)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, width: int, height: int, mask: np.ndarray | None = None) -> SourceImage:
        """The tokens of one source image, on the CPU.

        The mode of the VAE's posterior is taken, not a sample: so the seed decides the noise only, and the ``n`` images
        of a request share one source.

        Args:
            pixels: (height, width, 3), uint8, of any size; what has the model's size already is taken as it is.
            width, height: pixels of the image to make, the size of a source for ``strength``.
            mask: (height, width) of ``pixels``, uint8, bright where inpainting paints; with ``strength`` only.
        """
        image = Image.fromarray(pixels)
        fitted = fit_source(image, self._family, width, height, self._max_pixels)
        batch = self._processor.preprocess(fitted).to(self._vae.device, self._vae.dtype)  # (1, 3, height, width)
        tokens = self._family.layout.from_vae(self._vae, self._vae.encode(batch).latent_dist.mode())
        return SourceImage(tokens[0].cpu(), *fitted.size, None if mask is None else latent_mask(mask, width, height))


def latent_mask(mask: np.ndarray, width: int, height: int) -> torch.Tensor:
    """(height / 8, width / 8), bool, True where ``mask``, scaled to width x height, is bright.

    Of the pixels of a latent the upper left one decides, as in diffusers' ``FluxInpaintPipeline``.
    """
    fitted = Image.fromarray(mask).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted)[::LATENT_PIXELS, ::LATENT_PIXELS] >= PAINTED)
