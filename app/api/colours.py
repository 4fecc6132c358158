"""From the pixels that files have to sRGB and opacity: transparency, sixteen bits, ICC profiles."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def srgb_and_alpha(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """A decoded image as RGB in sRGB, eight bits each, and how opaque its pixels are, L, None when all are wholly.

    Args:
        data: the file that it was read from.
    """
    alpha = _alpha(image, data)
    if alpha is not None and np.asarray(alpha).min() == 255:
        alpha = None
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return _to_srgb(image), alpha


def on_white(colours: Image.Image, alpha: Image.Image) -> Image.Image:
    """``colours`` on white paper, which shows where they are transparent."""
    paper = Image.new("RGB", colours.size, "white")
    paper.paste(colours, mask=alpha)
    return paper


def _alpha(image: Image.Image, data: bytes) -> Image.Image | None:
    """How opaque each pixel is, 0 to 255; None when all are.

    Pillow compares a PNG's one transparent colour, which has the file's depth, with pixels that it made eight bits.
    """
    colour: Any = image.info.get("transparency")
    depth = data[24]  # in a PNG's header
    if image.mode.startswith("I"):
        return None if colour is None else Image.fromarray(((np.asarray(image) != colour) * 255).astype(np.uint8))
    if not image.has_transparency_data:
        return None
    if image.format == "PNG" and image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.format == "PNG" and image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image.convert("RGBA").getchannel("A")


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB by the image's ICC profile; one that is damaged or is for other pixels counts as sRGB, as in browsers."""
    profile = image.info.get("icc_profile")
    grey = image.mode in ("1", "L", "LA", "La")
    plain = image.convert("L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")
    if not profile:
        return plain.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if grey and space == "RGB":
            plain = plain.convert("RGB")
        if _SPACES[plain.mode] == space:
            converted = ImageCms.profileToProfile(plain, source, _SRGB, outputMode="RGB")
            return plain if converted is None else converted
    except (ImageCms.PyCMSError, OSError):
        pass
    return plain.convert("RGB")
