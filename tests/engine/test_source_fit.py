"""Sizes of source images against what diffusers' pipelines make of them; a fitted image stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from app.engine.families import FLUX2_KLEIN, FLUX_DEV, FLUX_KONTEXT, Family
from app.engine.source_fit import fit_source, nearest_trained_size, within_area

SIZES = [(1000, 1000), (300, 200), (200, 300), (1920, 1080), (64, 512), (4000, 100), (17, 16)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_kontext_takes_the_pipelines_size(width: int, height: int) -> None:
    shape = width / height
    _, *expected = min((abs(shape - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert sorted(FLUX_KONTEXT.trained_sizes) == sorted(PREFERRED_KONTEXT_RESOLUTIONS)
    assert nearest_trained_size(FLUX_KONTEXT.trained_sizes, width, height, 1024 * 1024) == tuple(expected)


def test_a_small_server_takes_the_same_shapes_smaller() -> None:
    width, height = nearest_trained_size(FLUX_KONTEXT.trained_sizes, 1920, 1080, 256 * 256)
    assert (width, height) == (1392 // 4 // 16 * 16, 752 // 4 // 16 * 16)


@pytest.mark.parametrize(("width", "height"), [(1500, 1100), (300, 200), (65, 513)])
def test_klein_takes_the_pipelines_pixels(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = Flux2ImageProcessor()
    limit = 512 * 512
    scaled = processor._resize_to_target_area(image, limit) if width * height > limit else image
    expected = processor.preprocess(
        scaled, height=scaled.height // 16 * 16, width=scaled.width // 16 * 16, resize_mode="crop"
    )
    ours = torch.from_numpy(np.array(within_area(image, limit))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ours[None], expected)


@pytest.mark.parametrize("family", [FLUX_DEV, FLUX_KONTEXT, FLUX2_KLEIN])
@pytest.mark.parametrize("max_pixels", [128 * 128, 200 * 200, 1024 * 1024, 2048 * 2048])
def test_what_is_fitted_stays_as_it_is(family: Family, max_pixels: int) -> None:
    for width, height in SIZES:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        fitted = fit_source(Image.fromarray(pixels), family, 160, 96, max_pixels)
        assert fitted.width * fitted.height <= max(160 * 96, min(max_pixels, 1024 * 1024) * 1.02)
        again = fit_source(fitted, family, 160, 96, max_pixels)
        assert (np.asarray(again) == np.asarray(fitted)).all()
