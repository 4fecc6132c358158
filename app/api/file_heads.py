"""What the first bytes of an image file tell before anything is decoded."""

from __future__ import annotations

import struct

_SIGNATURES = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\x01\0", "icon"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<", "HTML"),
)
# Brands of the ISO container (bytes 8 to 12 of the file).
_BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}


def kind_of(data: bytes) -> str | None:
    """The name of a common kind of file that is read nowhere here; None for any other."""
    if data[4:8] == b"ftyp":
        # The brand may be a general one, with the particular one among those that follow.
        brands = {data[place : place + 4] for place in range(8, min(int.from_bytes(data[:4]), 64), 4)}
        return next((kind for kind, known in _BRANDS.items() if brands & set(known)), "video")
    head = data[:64].lstrip()
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)


def is_held_whole(jpeg: bytes) -> bool:
    """Whether libjpeg keeps the coefficients of the whole JPEG, of its full size, to decode it at any scale.

    It does so when the first scan has not all components, or is the first pass of several (a progressive file).
    """
    components, place = 0, 2
    while place + 10 <= len(jpeg) and jpeg[place] == 0xFF:
        marker, (length,) = jpeg[place + 1], struct.unpack_from(">H", jpeg, place + 2)
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in (0xC0, 0xC1):
                return True
            components = jpeg[place + 9]
        elif marker == 0xDA:
            return jpeg[place + 4] < components
        place += 2 + length
    return True
