"""The renderer and the checker share no code: they must agree on the truth, and the checker must be able to say no."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from models.recipe import checker, scenes
from models.recipe.scenes import Scene, Thing

PAIR = Scene((Thing("red", "circle", "medium"), Thing("blue", "square", "medium")), "left of", "yellow")


def draw(scene: Scene, size: tuple[int, int] = (128, 128), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(scenes.render(scene.background, scenes.place(scene, *size, rng), *size))


@pytest.mark.parametrize("size", scenes.ASPECTS)
def test_rendered_scenes_pass(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        scene = scenes.sample(rng, held_out=True)
        assert checker.check(draw(scene, size, seed), scene).perfect, scene


def test_wrong_background_is_seen() -> None:
    verdict = checker.check(draw(dataclasses.replace(PAIR, background="green")), PAIR)
    assert not verdict.background
    assert verdict.shapes == (True, True)


def test_wrong_colour_is_seen() -> None:
    other = dataclasses.replace(PAIR, things=(Thing("purple", "circle", "medium"), PAIR.things[1]))
    assert checker.check(draw(other), PAIR).colours == (False, True)


@pytest.mark.parametrize("relation", ["right of", "above"])
def test_wrong_half_is_seen(relation: str) -> None:
    assert checker.check(draw(dataclasses.replace(PAIR, relation=relation)), PAIR).colours == (False, False)


def test_swapped_colours_are_seen() -> None:
    first, second = PAIR.things
    swapped = (dataclasses.replace(first, colour=second.colour), dataclasses.replace(second, colour=first.colour))
    assert checker.check(draw(dataclasses.replace(PAIR, things=swapped)), PAIR).colours == (False, False)


@pytest.mark.parametrize("size", scenes.SIZES)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_each_shape_is_told_from_all_others(shape: str, size: str) -> None:
    for background in ("white", "black", "red"):
        scene = Scene((Thing("green", shape, size), Thing("blue", "circle", size)), "above", background)
        assert checker.check(draw(scene), scene).seen == (shape, "circle")


def test_an_empty_canvas_has_no_objects() -> None:
    verdict = checker.check(Image.new("RGB", (128, 128), scenes.COLOURS["yellow"]), PAIR)
    assert verdict.background
    assert not any(verdict.colours + verdict.shapes)


def test_noise_is_wrong_in_every_respect() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    verdict = checker.check(Image.fromarray(noise), PAIR)
    assert not verdict.background
    assert not any(verdict.colours + verdict.shapes)
