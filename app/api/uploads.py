"""Uploaded images: decoded within limits, upright, opaque, in RGB; and what size an edit of one has."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from app.api.backend import SourcePixels
from app.errors import InvalidRequestError
from app.settings import SamplingSettings

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 64
"""Pixels; FLUX.2's pipeline takes no smaller reference, and less says nothing to the other models."""
MAX_ASPECT = 8
"""Longer side by shorter, likewise."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)


def read_upload(data: bytes, param: str, max_pixels: int) -> SourcePixels:
    """Decode one uploaded file. Nothing is decoded before its header has been found to be within the limits.

    Args:
        data: the file.
        param: the form's field, for errors.
        max_pixels: width x height at most.

    Raises:
        InvalidRequestError: not a PNG, JPEG or WebP, damaged, animated, too large, too small or too narrow.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, param, max_pixels)
            image.load()
            return SourcePixels(np.asarray(_opaque(ImageOps.exif_transpose(image))))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(f"{param} has more than {max_pixels} pixels", param=param) from error
    except _UNREADABLE as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {str(error)[:120]}"
        raise InvalidRequestError(
            f"{param} cannot be read as a PNG, JPEG or WebP image ({len(data)} bytes){reason}", param=param
        ) from error


def _check(image: Image.Image, param: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"{param} is {width}x{height}; at most {max_pixels} pixels are allowed: scale it down", param=param
        )
    if min(width, height) < MIN_SIDE:
        raise InvalidRequestError(f"{param} is {width}x{height}; both sides need {MIN_SIDE} pixels", param=param)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequestError(
            f"{param} is {width}x{height}; one side may be at most {MAX_ASPECT} times the other: crop it", param=param
        )
    # A phone's JPEG may hold further images (MPO), of which the first is the one that is meant.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise InvalidRequestError(f"{param} is animated; send a single image", param=param)


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, sixteen bits become eight."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert("RGB")


def size_like(source: SourcePixels, limits: SamplingSettings) -> tuple[int, int]:
    """The (width, height) with the shape of ``source`` and about the server's default number of pixels."""
    height, width = source.pixels.shape[:2]
    scale = math.sqrt(limits.default_width * limits.default_height / (width * height))
    sides = [_side(width * scale, limits), _side(height * scale, limits)]
    while sides[0] * sides[1] > limits.max_pixels:
        sides[sides.index(max(sides))] -= limits.side_multiple
    return sides[0], sides[1]


def _side(pixels: float, limits: SamplingSettings) -> int:
    multiple = limits.side_multiple
    return min(max(round(pixels / multiple) * multiple, limits.min_side), limits.max_side)
