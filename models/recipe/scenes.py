"""The data: procedural scenes of one or two flat shapes, their captions and their exact labels."""

import math
import zlib
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (30, 165, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 215, 40),
    "cyan": (40, 205, 225),
    "purple": (150, 45, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")
MIRROR = {"right of": "left of", "below": "above"}

# (width, height): the default square and two other aspect ratios; multiples of 16, the side of a token in pixels.
ASPECTS = ((128, 128), (160, 96), (96, 160))
TOKEN = 16

# Radius as a share of the short side. Two objects share the canvas, so each has half of it.
RADIUS_ALONE = {"small": 0.17, "medium": 0.25, "large": 0.34}
RADIUS_PAIR = {"small": 0.115, "medium": 0.155, "large": 0.2}
# One scene in eight is never trained on: evaluation draws from those.
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it; without a size word it is drawn medium."""

    colour: str
    shape: str
    size: str | None

    @property
    def words(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing, or two and how the first stands to the second."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def held_out(self) -> bool:
        """By a hash of the attributes, so that no phrasing of a held-out scene, mirrored or not, is trained on."""
        things, relation = self.things, self.relation
        if relation in MIRROR:
            things, relation = things[::-1], MIRROR[relation]
        key = "|".join([*(thing.words for thing in things), str(relation), self.background])
        return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Placed:
    """A thing on the canvas, in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


def sample(rng: np.random.Generator, *, held_out: bool, pairs: float = 0.65) -> Scene:
    """A scene from one side of the split; a share `pairs` has two things."""
    while True:
        count = 2 if rng.random() < pairs else 1
        colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: count + 1]]
        things = tuple(
            Thing(
                colour,
                SHAPES[rng.integers(len(SHAPES))],
                None if rng.random() < 0.25 else SIZES[rng.integers(len(SIZES))],
            )
            for colour in colours[1:]
        )
        relation = RELATIONS[rng.integers(len(RELATIONS))] if count == 2 else None
        scene = Scene(things, relation, colours[0])
        if scene.held_out == held_out:
            return scene


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words; with a generator, in one of a few phrasings."""

    def chance(share: float) -> bool:
        return rng is not None and rng.random() < share

    first, *rest = [f"a {thing.words}" for thing in scene.things]
    objects = first
    if rest:
        relation = str(scene.relation)
        if relation.endswith(" of") and chance(0.4):
            relation = f"to the {relation}"
        objects = f"{first} {relation} {rest[0]}"
    style = rng.random() if rng is not None else 0.0
    if style < 0.8:
        text = f"{objects} on a {scene.background} background"
    elif style < 0.9:
        text = f"{objects} against a {scene.background} background"
    else:
        text = f"a {scene.background} background with {objects}"
    if chance(0.1):
        text = text[0].upper() + text[1:]
    if chance(0.1):
        text += "."
    return text


def place(scene: Scene, width: int, height: int, rng: np.random.Generator) -> list[Placed]:
    """Positions with a little jitter; of two things, each stays inside its half."""
    short = min(width, height)
    radii = RADIUS_PAIR if scene.relation else RADIUS_ALONE
    centres = {
        None: [(0.5, 0.5)],
        "left of": [(0.25, 0.5), (0.75, 0.5)],
        "right of": [(0.75, 0.5), (0.25, 0.5)],
        "above": [(0.5, 0.25), (0.5, 0.75)],
        "below": [(0.5, 0.75), (0.5, 0.25)],
    }[scene.relation]
    placed = []
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        dx, dy = rng.uniform(-0.025, 0.025, 2) * short
        radius = radii[thing.size or "medium"] * short * rng.uniform(0.97, 1.03)
        placed.append(Placed(thing, x * width + dx, y * height + dy, radius))
    return placed


def distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels from the outline (negative inside), y down; exact near the edges, where it is used."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    if shape == "cross":
        x, y, arm = np.abs(x), np.abs(y), 0.32 * r
        return np.minimum(np.maximum(x - arm, y - r), np.maximum(x - r, y - arm))
    if shape == "triangle":
        inner = 0.58 * r
        y = y - 0.5 * inner  # The bounding box, not the centroid, stands in the centre.
        return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - inner
    if shape == "star":
        tip, notch, sector = 1.1 * r, 0.48 * r, math.pi / 5
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # Folded onto half a point.
        radius = np.hypot(x, y)
        edge_x, edge_y = notch * math.cos(sector) - tip, notch * math.sin(sector)
        return (edge_y * (radius * np.cos(angle) - tip) - edge_x * radius * np.sin(angle)) / math.hypot(edge_x, edge_y)
    if shape == "heart":  # Not among SHAPES: a low-rank adapter teaches it.
        return _heart(np.abs(x) / (0.95 * r), 0.45 - y / (0.95 * r)) * 0.95 * r
    raise ValueError(f"unknown shape {shape!r}")


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The right half of a heart of about unit size, tip in the origin, y up: a quarter disc on two edges."""
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = 0.5 * np.maximum(x + y, 0)
    edges = np.minimum(np.hypot(x, y - 1), np.hypot(x - along, y - along)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, edges)


def coverage(placed: Placed, width: int, height: int, pixel: float = 1.0) -> np.ndarray:
    """(height, width) float32 in [0, 1]: how much of each pixel the thing covers; `pixel` > 1 draws it coarser."""
    y, x = np.ogrid[0:height, 0:width]
    x = (x.astype(np.float32) + 0.5) * pixel - placed.x
    y = (y.astype(np.float32) + 0.5) * pixel - placed.y
    return np.clip(0.5 - distance(placed.thing.shape, x, y, placed.radius) / pixel, 0, 1).astype(np.float32)


def render(background: str, placed: list[Placed], width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, anti-aliased."""
    image = np.broadcast_to(np.array(COLOURS[background], np.float32), (height, width, 3))
    for item in placed:
        alpha = coverage(item, width, height)[..., None]
        image = image * (1 - alpha) + np.array(COLOURS[item.thing.colour], np.float32) * alpha
    return np.round(image).astype(np.uint8)


LABELS = len(COLOURS) + len(SHAPES) + 1


def labels(background: str, placed: list[Placed], width: int, height: int, cell: int = TOKEN) -> np.ndarray:
    """(height / cell, width / cell, LABELS) float32: a cell's shares of colours, then of shapes and none."""
    pixel = 4
    rows, columns, fine = height // cell, width // cell, cell // pixel
    result = np.zeros((rows, columns, LABELS), np.float32)
    free = np.ones((rows, columns), np.float32)
    for item in placed:
        alpha = coverage(item, width // pixel, height // pixel, pixel)
        share = alpha.reshape(rows, fine, columns, fine).mean((1, 3))
        result[..., list(COLOURS).index(item.thing.colour)] += share
        result[..., len(COLOURS) + SHAPES.index(item.thing.shape)] += share
        free -= share
    result[..., list(COLOURS).index(background)] += free
    result[..., -1] = free
    return result
