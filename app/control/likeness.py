"""How close images are to others. Pure: tensors of pixels in [0, 1], (rows, 3, height, width)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

EQUAL_DB = 100.0
"""PSNR of equal images, so that means stay finite."""


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB after rounding to 8 bits, as served, `EQUAL_DB` at most; (rows,)."""
    mse = (_bytes(images) - _bytes(reference)).square().flatten(1).mean(dim=1)
    return torch.where(mse > 0, -10 * mse.clamp(min=1e-12).log10(), EQUAL_DB).clamp(max=EQUAL_DB)


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round() / 255


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11, by channel; (rows,)."""
    taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (taps[:, None] * taps[None, :] / taps.sum() ** 2).expand(3, 1, 11, 11)

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = blur(images), blur(reference)
    var_a, var_b = blur(images**2) - mean_a**2, blur(reference**2) - mean_b**2
    covariance = blur(images * reference) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.flatten(1).mean(dim=1)
