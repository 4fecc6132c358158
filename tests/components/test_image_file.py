"""Image files and the settings in them, read back as other programs read them."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from app.components.image_file import image_file, pixels_of

IMAGE = Image.new("RGB", (64, 48), "red")
TEXT = 'a red "circle"\nNegative prompt: blue\nSteps: 28, Seed: 7'


@pytest.mark.parametrize("text", [TEXT, f"ein Kreis, 円, 🔴\n{TEXT}"])
def test_the_parameters_of_a_png(text: str) -> None:
    image = Image.open(io.BytesIO(image_file(IMAGE, "png", 100, text)))
    assert image.info["parameters"] == text
    assert image.convert("RGB").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
@pytest.mark.parametrize("text", [TEXT, f"円, 🔴\n{TEXT}", "🔴" * 12000])
def test_the_user_comment_of_the_others(output_format: str, text: str) -> None:
    """EXIF: eight bytes that name the encoding, then the text."""
    image = Image.open(io.BytesIO(image_file(IMAGE, output_format, 90, text)))
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == text


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_without_parameters_there_is_nothing_but_the_image(output_format: str) -> None:
    image = Image.open(io.BytesIO(image_file(IMAGE, output_format, 90)))
    assert "parameters" not in image.info
    assert not image.getexif()


def test_pixels_are_those_of_the_file() -> None:
    pixels = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.equal((pixels_of(image_file(image, "png", 100)) * 255).round().byte(), pixels)
