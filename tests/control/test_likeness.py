"""PSNR as served, and SSIM by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.control.likeness import EQUAL_DB, psnr, ssim


@pytest.fixture
def images() -> torch.Tensor:
    ramp = torch.linspace(0.2, 0.7, 48)
    return (ramp[None, :] * ramp[:, None]).expand(2, 3, 48, 48).clone()


def test_psnr_is_of_eight_bits_and_finite(images: torch.Tensor) -> None:
    assert psnr(images, images).tolist() == [EQUAL_DB] * 2
    assert psnr(images, images + 1e-5)[0] > 60  # few pixels round to another value
    other = images.clone()
    other[1] = ((images[1] * 255).round() + 5) / 255
    expected = 20 * np.log10(255 / 5)
    assert psnr(images, other).tolist() == pytest.approx([EQUAL_DB, expected], rel=1e-5)


def test_ssim_falls_with_structure_and_hardly_with_brightness(images: torch.Tensor) -> None:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    equal, brighter, noisy = (ssim(images, other)[0].item() for other in (images, images + 0.02, images + noise))
    assert equal == pytest.approx(1.0)
    assert brighter > 0.98 > 0.5 > noisy


def test_ssim_of_a_window_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 1, 1, 11, 11, generator=generator).expand(2, 1, 3, 11, 11)
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    x, y = a[0, 0].numpy(), b[0, 0].numpy()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * x**2).sum() - mean_x**2, (weights * y**2).sum() - mean_y**2
    covariance = (weights * x * y).sum() - mean_x * mean_y
    expected = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-4)
