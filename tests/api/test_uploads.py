"""Uploaded images: decoded within limits, upright, opaque; and the size of an edit of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.api.uploads import read_head, read_upload, size_like
from app.errors import InvalidRequestError
from app.settings import SamplingSettings
from tests.api.edit_forms import encoded, plain

LIMIT = 1 << 24


def _animated(file_format: str) -> bytes:
    return encoded(plain(), file_format, save_all=True, append_images=[plain(colour="blue")])


def _truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise))[:6000]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: b"", "cannot be read as a PNG, JPEG or WebP"),
        (lambda: b"GIF89a" + bytes(64), "cannot be read"),
        (lambda: encoded(plain(), "GIF"), "cannot be read"),
        (lambda: encoded(plain(), "BMP"), "cannot be read"),
        (lambda: encoded(plain(), "TIFF"), "cannot be read"),
        (_truncated, "cannot be read"),
        (lambda: _animated("PNG"), "is animated"),
        (lambda: _animated("WEBP"), "is animated"),
        (lambda: encoded(plain(4097, 4096, 0, "1")), "at most 16777216 pixels"),
        (lambda: encoded(plain(20000, 20000, 0, "1")), "pixels"),
        (lambda: encoded(plain(63, 64)), "both sides need 64 pixels"),
        (lambda: encoded(plain(64, 513)), "at most 8 times"),
    ],
)
def test_a_image_that_is_not_taken(make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        read_upload(make(), "image[1]", LIMIT)
    assert refused.value.param == "image[1]"
    assert "image[1]" in refused.value.message


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain(), (255, 0, 0)),
        (plain(mode="P", colour=0), (0, 0, 0)),
        (plain(mode="L", colour=128), (128, 128, 128)),
        (plain(mode="RGBA", colour=(255, 0, 0, 0)), (255, 255, 255)),
        (plain(mode="LA", colour=(0, 255)), (0, 0, 0)),
        (Image.fromarray(np.full((64, 64), 128 * 257, dtype=np.uint16)), (128, 128, 128)),
    ],
)
def test_every_kind_becomes_opaque_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert (read_upload(encoded(image), "image", LIMIT).pixels == expected).all()


def test_a_photo_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    photo = plain(96, 64)
    photo.paste("blue", (0, 0, 48, 64))
    pixels = read_upload(encoded(photo, "JPEG", exif=exif, quality=95), "image", LIMIT).pixels
    assert pixels.shape == (96, 64, 3)
    assert pixels[10, 32, 2] > 200
    assert pixels[85, 32, 0] > 200


@settings(max_examples=200)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
def test_a_damaged_file_is_an_error_or_a_image(file_format: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(plain(), file_format))
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    with contextlib.suppress(InvalidRequestError):
        assert read_upload(bytes(data), "image", LIMIT).pixels.dtype == np.uint8


@settings(max_examples=200)
@given(st.integers(64, 4096), st.integers(1, 8), st.booleans())
def test_the_size_of_an_edit_is_within_the_limits(side: int, aspect: int, upright: bool) -> None:
    width, height = (side, side * aspect) if upright else (side * aspect, side)
    limits = SamplingSettings()
    chosen = size_like(width, height, limits)
    assert all(value % 16 == 0 and 64 <= value <= 256 for value in chosen)
    assert chosen[0] * chosen[1] <= limits.max_pixels
    assert (chosen[0] >= chosen[1]) == (width >= height) or chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("limit", "size"), [(600 * 400, (600, 400)), (239999, (300, 200)), (20000, (150, 100)), (4000, (75, 50))]
)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_photo_is_read_at_reduced_scale(limit: int, size: tuple[int, int], progressive: bool) -> None:
    image = plain(600, 400)
    image.paste("blue", (0, 0, 300, 400))
    pixels = read_upload(encoded(image, "JPEG", progressive=progressive), "image", limit).pixels
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels[5, 5, 2] > 200
    assert pixels[5, -5, 0] > 200
    with pytest.raises(InvalidRequestError, match="is 600x400; at most 3000 pixels"):
        read_upload(encoded(image, "JPEG"), "image", 3000)
    for other in (encoded(image), encoded(image, "WEBP")):
        with pytest.raises(InvalidRequestError, match="is 600x400; at most 239999 pixels"):
            read_upload(other, "image", 239999)


def test_what_libjpeg_holds_of_a_progressive_photo_counts_at_its_full_size() -> None:
    image = plain(600, 400)
    assert read_head(encoded(image, "JPEG"), "image", 20000).work_bytes == 150 * 100 * 16
    held = read_head(encoded(image, "JPEG", progressive=True), "image", 20000)
    assert held.work_bytes == 150 * 100 * 16 + 600 * 400 * 8


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    photo = encoded(plain(600, 400), "JPEG", progressive=True)
    last = photo.rindex(b"\xff\xda")
    assert read_upload(photo[:-2] + photo[last:-2] * 50 + photo[-2:], "image", LIMIT).pixels.shape == (400, 600, 3)
    with pytest.raises(InvalidRequestError, match="image is a JPEG of 110 scans; at most 100 are read: save it again"):
        read_upload(photo[:-2] + photo[last:-2] * 100 + photo[-2:], "image", LIMIT)


def test_odd_sides_are_reduced_as_well() -> None:
    for width in range(127, 135):
        pixels = read_upload(encoded(plain(width, 131), "JPEG"), "image", 67 * 66).pixels
        assert pixels.shape == (-(-131 // 2), -(-width // 2), 3)


def test_more_pixels_than_pillow_takes() -> None:
    photo = encoded(plain(14000, 13000, 0, "L"), "JPEG", quality=10)
    assert read_upload(photo, "image", LIMIT).pixels.shape == (3250, 3500, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_stands_upright(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = plain(96, 64)
    photo.paste("blue", (0, 0, 48, 32))
    file = encoded(photo, file_format, exif=exif, quality=95)
    pixels = read_upload(file, "image", LIMIT).pixels
    assert pixels.shape == ((64, 96, 3) if orientation < 5 else (96, 64, 3))
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    row, column = corners[orientation]
    blue = pixels[10 if row == 0 else -10, 10 if column == 0 else -10]
    assert blue[2] > 200 > 100 > blue[0]
    assert (pixels[..., 2] > 128).mean() == pytest.approx(0.25, abs=0.02)
