"""Uploaded images: decoded within limits, upright, opaque, in sRGB; and what size an edit of one has."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from app.api.backend import SourcePixels
from app.api.colours import on_white, srgb_and_alpha
from app.api.file_heads import is_held_whole, kind_of
from app.api.masks import closed, holes_of, mask_of
from app.errors import InvalidRequestError
from app.messages.conditioning import PAINTED
from app.settings import SamplingSettings

Fit = Callable[[Image.Image], Image.Image]
"""Scales an image to what the model takes."""
FORMATS = ("PNG", "JPEG", "WEBP")
_JPEG = ("JPEG", "MPO")
MIN_SIDE = 64
"""Pixels; FLUX.2's pipeline takes no smaller reference, and less says nothing to the other models."""
MAX_ASPECT = 8
"""Longer side by shorter, likewise."""
MAX_SCANS = 100
"""Of a JPEG. Encoders write a dozen; each more costs a few bytes of the file, and a pass over all of the image."""
_REDUCTIONS = (1, 2, 4, 8)
"""What libjpeg can divide the sides by while it decodes."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image with each value of EXIF's orientation."""
_ON_ITS_SIDE = (5, 6, 7, 8)
_BYTES_PER_PIXEL = 16
"""At most, while an image is decoded and converted: Pillow keeps four for each layer; measured as 14."""
_BYTES_PER_PIXEL_WHOLE = 8
"""Beside these, of the file at its full size, where the decoder keeps all of it in a form of its own: two of each
coefficient in libjpeg; measured as 8 with WebP."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)

# `_check` holds every file to the service's own limit; Pillow's would refuse photos that can be read at reduced scale.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class UploadHead:
    """What a file's header says.

    Attributes:
        width, height: pixels of the upright image.
        work_bytes: memory that decoding it takes.
        may_be_transparent: its kind of pixels can be.
    """

    width: int
    height: int
    work_bytes: int
    may_be_transparent: bool


def read_head(data: bytes, param: str, max_pixels: int) -> UploadHead:
    """The header of one uploaded file.

    Raises:
        InvalidRequestError: as `read_upload`, but for what only decoding shows.
    """
    with _opened(data, param) as image:
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) in _ON_ITS_SIDE
        width, height = reversed(image.size) if turned else image.size
        _check(image, data, param, max_pixels)
        whole = image.format == "WEBP" or (image.format in _JPEG and is_held_whole(data))
        decoded = image.width * image.height  # fewer than in the file where that is read at reduced scale
        work_bytes = decoded * _BYTES_PER_PIXEL + (width * height * _BYTES_PER_PIXEL_WHOLE if whole else 0)
        return UploadHead(width, height, work_bytes, image.has_transparency_data)


def read_upload(
    data: bytes, param: str, max_pixels: int, fit: Fit = lambda image: image, inpaints: bool = False
) -> SourcePixels:
    """Decode one uploaded file. Nothing is decoded before its header has been found to be within the limits.

    A JPEG with more pixels is read at half, a quarter or an eighth of its size.

    Args:
        data: the file.
        param: the form's field, for errors.
        max_pixels: width x height at most.
        fit: scales the upright image.
        inpaints: transparent parts are the image's mask, and become white otherwise.

    Raises:
        InvalidRequestError: not a PNG, JPEG or WebP, damaged, animated, too large, too small or too narrow.
    """
    colours, alpha = _decoded(data, param, max_pixels)
    if alpha is None:
        return SourcePixels(np.asarray(fit(colours)))
    if not inpaints or holes_of(alpha) is None:
        return SourcePixels(np.asarray(fit(on_white(colours, alpha))), on_white=True)
    colours.putalpha(alpha)
    fitted = fit(colours)
    return SourcePixels(np.asarray(closed(fitted)), 255 - np.asarray(fitted.getchannel("A")))


def read_mask(data: bytes, param: str, max_pixels: int, fit: Fit = lambda image: image) -> np.ndarray:
    """The mask in an uploaded file, scaled by ``fit``, (height, width), uint8; see `app.api.masks.mask_of`.

    Raises:
        InvalidRequestError: as `read_upload`, or nothing is to be painted.
    """
    mask = mask_of(*_decoded(data, param, max_pixels))
    if mask.max() < PAINTED:
        raise InvalidRequestError(
            f"{param} marks nothing to paint: make the parts to change transparent, or white in a mask without "
            "transparency",
            param=param,
        )
    return np.asarray(fit(Image.fromarray(mask)))


def _decoded(data: bytes, param: str, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    """An uploaded image upright: its colours and its opacity, see `srgb_and_alpha`."""
    with _opened(data, param) as image:
        _check(image, data, param, max_pixels)
        turn = _UPRIGHT.get(Image.Image.getexif(image).get(_ORIENTATION, 1))
        image.load()
        colours, alpha = srgb_and_alpha(image, data)
    if turn is None:
        return colours, alpha
    return colours.transpose(turn), None if alpha is None else alpha.transpose(turn)


@contextlib.contextmanager
def _opened(data: bytes, param: str) -> Iterator[Image.Image]:
    """The file as an image whose header is read; what goes wrong in reading it is an `InvalidRequestError`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except _UNREADABLE as error:
        kind = kind_of(data) if isinstance(error, UnidentifiedImageError) else None
        if kind is not None:
            raise InvalidRequestError(
                f"{param} is of the kind {kind} and cannot be read here: convert it to PNG, JPEG or WebP", param=param
            ) from error
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {str(error)[:120]}"
        raise InvalidRequestError(
            f"{param} cannot be read as a PNG, JPEG or WebP image ({len(data)} bytes){reason}", param=param
        ) from error


def _check(image: Image.Image, data: bytes, param: str, max_pixels: int) -> None:
    width, height = image.size
    reduction = _reduction(image, max_pixels)
    if reduction is None:
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
    if image.format in _JPEG and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise InvalidRequestError(
            f"{param} is a JPEG of {scans} scans; at most {MAX_SCANS} are read: save it again", param=param
        )
    if reduction > 1:
        image.draft(None, (width // reduction, height // reduction))


def _reduction(image: Image.Image, max_pixels: int) -> int | None:
    """What to divide the sides by so that at most ``max_pixels`` are decoded; None if that is not possible."""
    width, height = image.size
    for reduction in _REDUCTIONS:
        if math.ceil(width / reduction) * math.ceil(height / reduction) <= max_pixels:
            return reduction
        if image.format not in _JPEG:
            return None
    return None


def size_like(width: int, height: int, limits: SamplingSettings) -> tuple[int, int]:
    """The (width, height) with the shape of a source and about the server's default number of pixels."""
    scale = math.sqrt(limits.default_width * limits.default_height / (width * height))
    sides = [_side(width * scale, limits), _side(height * scale, limits)]
    while sides[0] * sides[1] > limits.max_pixels:
        sides[sides.index(max(sides))] -= limits.side_multiple
    return sides[0], sides[1]


def _side(pixels: float, limits: SamplingSettings) -> int:
    multiple = limits.side_multiple
    return min(max(round(pixels / multiple) * multiple, limits.min_side), limits.max_side)
