"""Files that are told by their first bytes."""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from app.api.file_heads import is_held_whole
from app.api.uploads import read_upload
from app.errors import InvalidRequestError
from tests.api.edit_forms import encoded, plain

LIMIT = 1 << 24


def test_which_jpegs_are_held_whole() -> None:
    def scans(*components: int) -> bytes:
        frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 64, 64, 3) + b"\1\x11\0\2\x11\1\3\x11\1"
        return b"\xff\xd8" + b"\xff\xe0\0\4ab" + frame + b"".join(
            b"\xff\xda" + struct.pack(">HB", 6 + 2 * count, count) + bytes(2 * count + 3) for count in components
        )  # fmt: skip

    assert not is_held_whole(scans(3))
    assert not is_held_whole(encoded(plain(), "JPEG"))
    assert not is_held_whole(encoded(plain(mode="L", colour=3), "JPEG", exif=Image.Exif().tobytes()))
    assert is_held_whole(scans(1, 2))
    assert is_held_whole(encoded(plain(), "JPEG", progressive=True))
    assert is_held_whole(b"\xff\xd8" + b"\xff" * 40)
    assert is_held_whole(encoded(plain(), "JPEG")[:40])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0avisiso8", "AVIF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"<!doctype html><html>", "HTML"),
        (b"  <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (encoded(plain(), "GIF"), "GIF"),
        (encoded(plain(), "TIFF"), "TIFF"),
        (encoded(plain(), "BMP"), "BMP"),
        (encoded(plain(), "JPEG2000"), "JPEG 2000"),
        (encoded(plain(), "AVIF"), "AVIF"),
    ],
)
def test_other_kinds_of_files_are_named(data: bytes, kind: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"image is of the kind {kind} and cannot be read here: convert it"):
        read_upload(data, "image", LIMIT)


def test_a_text_is_no_image() -> None:
    for data in (b"hello", b"", b"\0" * 100):
        with pytest.raises(InvalidRequestError, match="cannot be read as a PNG, JPEG or WebP image"):
            read_upload(data, "image", LIMIT)
