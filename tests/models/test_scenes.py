import numpy as np
import pytest

from models.recipe import scenes
from models.recipe.scenes import Scene, Thing

RED, BLUE = Thing("red", "circle", "small"), Thing("blue", "square", None)


def test_the_plain_caption() -> None:
    assert scenes.caption(Scene((BLUE,), None, "red")) == "a blue square on a red background"
    pair = Scene((RED, BLUE), "above", "yellow")
    assert scenes.caption(pair) == "a small red circle above a blue square on a yellow background"


def test_a_mirrored_scene_is_on_the_same_side_of_the_split() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.sample(rng, held_out=bool(rng.integers(2)))
        if scene.relation in scenes.MIRROR:
            mirrored = Scene(scene.things[::-1], scenes.MIRROR[scene.relation], scene.background)
            assert mirrored.held_out == scene.held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_keep_to_their_side_and_their_colours_differ(held_out: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = scenes.sample(rng, held_out=held_out)
        assert scene.held_out == held_out
        colours = [scene.background, *(thing.colour for thing in scene.things)]
        assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(("width", "height"), scenes.ASPECTS)
def test_two_things_stay_in_their_halves(width: int, height: int) -> None:
    rng = np.random.default_rng(2)
    for relation in scenes.RELATIONS:
        scene = Scene((Thing("red", "square", "large"), Thing("blue", "star", "large")), relation, "white")
        for placed in (item for _ in range(20) for item in scenes.place(scene, width, height, rng)):
            alpha = scenes.coverage(placed, width, height)
            halves = np.split(alpha, 2, axis=1 if relation.endswith("of") else 0)
            assert min(half.sum() for half in halves) == 0


def test_labels_are_shares() -> None:
    rng = np.random.default_rng(3)
    scene = scenes.sample(rng, held_out=False)
    shares = scenes.labels(scene.background, scenes.place(scene, 160, 96, rng), 160, 96)
    assert shares.shape == (6, 10, scenes.LABELS)
    colours = len(scenes.COLOURS)
    np.testing.assert_allclose(shares[..., :colours].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(shares[..., colours:].sum(-1), 1, atol=1e-5)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        scenes.distance("hexagon", np.zeros(1), np.zeros(1), 1.0)
