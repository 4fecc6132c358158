"""Colour profiles, and the transparency of files of every depth."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from app.api.uploads import read_upload
from tests.api.edit_forms import encoded, plain

LIMIT = 1 << 24
GREEN = (4000, 5000, 4000)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped() -> bytes:
    """A colour profile whose red is sRGB's blue."""
    table = SRGB[: 132 + 12 * struct.unpack(">I", SRGB[128:132])[0]]
    other = table.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return other + SRGB[len(table) :]


def linear_grey() -> bytes:
    """A profile of grey without a gamma curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    table = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 12)
    head = bytearray(SRGB[:128])
    head[:4], head[16:20], head[20:24] = struct.pack(">I", 188), b"GRAY", b"XYZ "
    head[8:12] = b"\2\x10\0\0"
    return bytes(head) + table + white + curve


def png(depth: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 64 equal rows, with a tRNS chunk."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 64, 64, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 64))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_colour_profile_is_followed(file_format: str) -> None:
    pixels = read_upload(encoded(plain(), file_format, icc_profile=swapped(), quality=95), "image", LIMIT).pixels
    assert np.abs(pixels.astype(int) - (0, 0, 255)).max() < 8
    transparent = encoded(plain(mode="RGBA", colour=(255, 0, 0, 128)), icc_profile=swapped())
    assert np.abs(read_upload(transparent, "image", LIMIT).pixels.astype(int) - (127, 127, 255)).max() < 3


def test_grey_profiles() -> None:
    for mode, colour in (("L", 128), ("LA", (128, 255))):
        file = encoded(plain(mode=mode, colour=colour), icc_profile=linear_grey())
        assert np.abs(read_upload(file, "image", LIMIT).pixels.astype(int) - 188).max() < 3


@pytest.mark.parametrize(
    ("image", "profile"),
    [
        (plain(), b"no profile"),
        (plain(), SRGB[:200]),
        (plain(), linear_grey()),
        (plain(mode="CMYK", colour=(0, 255, 255, 0)), SRGB),
    ],
)
def test_a_profile_that_does_not_fit_counts_as_srgb(image: Image.Image, profile: bytes) -> None:
    file = encoded(image, "JPEG" if image.mode == "CMYK" else "PNG", icc_profile=profile)
    assert np.abs(read_upload(file, "image", LIMIT).pixels.astype(int) - (255, 0, 0)).max() < 3


def test_a_grey_image_with_a_profile_of_colours() -> None:
    file = encoded(plain(mode="L", colour=128), icc_profile=swapped())
    assert np.abs(read_upload(file, "image", LIMIT).pixels.astype(int) - 128).max() < 3


@pytest.mark.parametrize(
    ("file", "left", "right"),
    [
        (png(16, 0, struct.pack(">64H", *[32896] * 32, *[32897] * 32), b"\x80\x81"), 128, 255),
        (png(8, 0, bytes([128] * 32 + [50] * 32), b"\0\x32"), 128, 255),
        (png(4, 0, b"\x88" * 16 + b"\x33" * 16, b"\0\x03"), 136, 255),
        (png(2, 0, b"\xaa" * 8 + b"\x00" * 8, b"\0\0"), 170, 255),
        (png(2, 0, b"\xaa" * 8 + b"\x55" * 8, b"\0\x01"), 170, 255),
        (png(1, 0, b"\xff" * 4 + b"\0" * 4, b"\0\0"), 255, 255),
        (png(16, 2, struct.pack(">192H", *[32896] * 96, *GREEN * 32), struct.pack(">3H", *GREEN)), 128, 255),
    ],
)  # fmt: skip
def test_the_transparent_colour_of_a_png_of_any_depth(file: bytes, left: int, right: int) -> None:
    pixels = read_upload(file, "image", LIMIT).pixels
    assert (pixels[:, 0] == left).all()
    assert (pixels[:, -1] == right).all()
