"""An independent judge of pictures: it counts pixels and matches silhouettes, and shares no code with the renderer.

It knows nothing of how scenes are drawn beyond the palette: colours are the nearest ones, positions are which half of
the canvas the pixels lie in, and a shape is the polygon that the silhouette overlaps best.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLOURS, Scene

NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), np.float32)  # (colours, 3)
MAX_DISTANCE = 75.0  # In RGB units: further than that from every colour, a pixel has none.
MIN_AREA = 0.004  # Of the canvas; a smaller patch is dirt, not an object.
SIDE = 48  # Silhouettes are compared at this size.


@dataclass(frozen=True)
class Verdict:
    """What is right in one picture, per object where objects differ."""

    background: bool
    colours: tuple[bool, ...]  # Colour and half.
    shapes: tuple[bool, ...]
    seen: tuple[str, ...]  # The shapes as seen, for the report.

    @property
    def perfect(self) -> bool:
        return self.background and all(self.colours) and all(self.shapes)


def nearest(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 to (h, w) colour numbers, -1 where no colour is near."""
    distances = np.linalg.norm(image.astype(np.float32)[:, :, None] - PALETTE, axis=-1)
    return np.where(distances.min(-1) < MAX_DISTANCE, distances.argmin(-1), -1)


def half(shape: tuple[int, int], side: str | None) -> np.ndarray:
    """(h, w) bool: the part of the canvas that `side` names; all of it for None."""
    height, width = shape
    mask = np.zeros(shape, bool)
    part = {
        None: (slice(None), slice(None)),
        "left of": (slice(None), slice(0, width // 2)),
        "right of": (slice(None), slice(width // 2, None)),
        "above": (slice(0, height // 2), slice(None)),
        "below": (slice(height // 2, None), slice(None)),
    }[side]
    mask[part] = True
    return mask


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}


def check(image: Image.Image, scene: Scene) -> Verdict:
    """The picture against what its caption says."""
    numbers = nearest(np.asarray(image.convert("RGB")))
    background = NAMES.index(scene.background)
    border = np.concatenate([numbers[:2].ravel(), numbers[-2:].ravel(), numbers.T[:2].ravel(), numbers.T[-2:].ravel()])
    sides = (scene.relation, OPPOSITE[scene.relation])
    colours, shapes, seen = [], [], []
    for thing, side in zip(scene.things, sides, strict=False):
        number = NAMES.index(thing.colour)
        mine, here = numbers == number, half(numbers.shape, side)
        others = here & (numbers >= 0) & (numbers != number) & (numbers != background)
        inside = int((mine & here).sum())
        colours.append(
            inside >= MIN_AREA * numbers.size and inside >= 0.85 * int(mine.sum()) and inside >= 3 * int(others.sum())
        )
        seen.append(silhouette(mine & here))
        shapes.append(seen[-1] == thing.shape)
    return Verdict(bool((border == background).mean() > 0.9), tuple(colours), tuple(shapes), tuple(seen))


def largest_patch(mask: np.ndarray) -> np.ndarray:
    """The largest connected patch of a mask: pixels take their four neighbours' highest number until none changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.maximum.reduce([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def outline(shape: str) -> Image.Image:
    """The ideal silhouette, drawn as polygons at four times SIDE."""
    size = 400
    canvas = Image.new("L", (size, size))
    pen, c, r = ImageDraw.Draw(canvas), size / 2, 150.0
    if shape in ("circle", "ring"):
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            pen.ellipse((c - r / 2, c - r / 2, c + r / 2, c + r / 2), fill=0)
    elif shape == "square":
        pen.rectangle((c - r, c - r, c + r, c + r), fill=255)
    elif shape == "cross":
        pen.rectangle((c - r, c - r / 3, c + r, c + r / 3), fill=255)
        pen.rectangle((c - r / 3, c - r, c + r / 3, c + r), fill=255)
    elif shape == "triangle":
        turns = [-math.pi / 2 + 2 * math.pi * i / 3 for i in range(3)]
        pen.polygon([(c + r * math.cos(t), c + r * math.sin(t)) for t in turns], fill=255)
    elif shape == "star":
        points = [(r if i % 2 == 0 else 0.43 * r, -math.pi / 2 + math.pi * i / 5) for i in range(10)]
        pen.polygon([(c + d * math.cos(t), c + d * math.sin(t)) for d, t in points], fill=255)
    elif shape == "heart":
        side, tip = 2 * r / 1.21, c + r
        for x in (c - side / 4, c + side / 4):
            y, lobe = tip - 0.75 * side, 0.354 * side
            pen.ellipse((x - lobe, y - lobe, x + lobe, y + lobe), fill=255)
        pen.polygon(
            [(c, tip), (c + side / 2, tip - side / 2), (c, tip - side), (c - side / 2, tip - side / 2)], fill=255
        )
    else:
        raise ValueError(f"no outline for {shape!r}")
    return canvas


def normalise(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool to (SIDE, SIDE) float in [0, 1]: cut to the bounding box, stretched to fill."""
    ys, xs = np.where(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    cut = Image.fromarray(mask.astype(np.uint8) * 255).crop(box)
    return np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


DRAWN = ("circle", "square", "triangle", "star", "cross", "ring")  # By flux-tiny without adapters.
SILHOUETTES = {name: normalise(np.asarray(outline(name)) > 127) for name in (*DRAWN, "heart")}


def silhouette(mask: np.ndarray, among: tuple[str, ...] = DRAWN) -> str:
    """The shape whose silhouette the mask's largest patch overlaps best (intersection over union), or "nothing"."""
    patch = largest_patch(mask)
    ys, xs = np.where(patch)
    if patch.sum() < MIN_AREA * mask.size:
        return "nothing"
    aspect = (np.ptp(xs) + 1) / (np.ptp(ys) + 1)
    if not 0.6 < aspect < 1.67:
        return "nothing"
    seen = normalise(patch)
    overlap = {
        name: float(np.minimum(seen, SILHOUETTES[name]).sum() / np.maximum(seen, SILHOUETTES[name]).sum())
        for name in among
    }
    best = max(overlap, key=lambda name: overlap[name])
    return best if overlap[best] > 0.6 else "nothing"


def mask_of(image: Image.Image, colour: str) -> np.ndarray:
    """(h, w) bool: the pixels that are nearest to ``colour``."""
    return nearest(np.asarray(image.convert("RGB"))) == NAMES.index(colour)


def share_of(image: Image.Image, colour: str) -> float:
    """The share of the pixels that are nearest to ``colour``."""
    return float(mask_of(image, colour).mean())
