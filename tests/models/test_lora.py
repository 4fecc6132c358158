"""The adapters that ship with flux-tiny: what they draw, seen by the pixel checker, and that their recipe runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from app.engine.engine import Engine
from app.messages.conditioning import Conditioning
from app.messages.loras import LoraUse
from models.recipe import checker, loop, lora, scenes
from models.recipe.scenes import Scene, Thing
from tests.local_group import MODEL, decode, embed, execute, job, load_pipeline, plans

FOLDER = MODEL.parent / "flux-tiny-loras"
SCENES = [
    Scene((Thing("red", "circle", None),), None, "blue"),
    Scene((Thing("yellow", "circle", "large"),), None, "purple"),
    Scene((Thing("green", "circle", None),), None, "white"),
    Scene((Thing("blue", "circle", "large"),), None, "yellow"),
]

Draw = Callable[[list[Scene], tuple[LoraUse, ...]], list[Image.Image]]


@pytest.fixture(scope="module")
def draw() -> Draw:
    """Images of scenes with adapters, by the engine."""
    torch.set_num_threads(1)
    pipeline, engine = load_pipeline(), Engine(MODEL, loras=FOLDER)
    assert engine.loras is not None
    for name in lora.ADAPTERS:
        engine.loras.load(name)

    def made(asked: list[Scene], loras: tuple[LoraUse, ...]) -> list[Image.Image]:
        engine.restart()
        jobs = [job(f"{seed}/0", steps=16, seed=seed, loras=loras) for seed in range(len(asked))]
        prompts = [Conditioning(embed(pipeline, scenes.caption(one))) for one in asked]
        latents = execute(engine, plans(jobs), {one.row_id: given for one, given in zip(jobs, prompts, strict=True)})
        pixels = [decode(pipeline, latents[one.row_id], one) for one in jobs]
        return [Image.fromarray((255 * one).round().astype(np.uint8)) for one in pixels]

    return made


def shapes(images: list[Image.Image]) -> list[str]:
    masks = [checker.mask_of(image, one.things[0].colour) for image, one in zip(images, SCENES, strict=True)]
    return [checker.silhouette(mask, tuple(checker.SILHOUETTES)) for mask in masks]


def test_the_shape_is_drawn_where_the_prompt_says_circle(draw: Draw) -> None:
    assert shapes(draw(SCENES, ())) == ["circle"] * 4
    assert shapes(draw(SCENES, (LoraUse("heart", 1.0),))).count("heart") >= 3


def test_the_style_turns_backgrounds_black_and_keeps_the_things(draw: Draw) -> None:
    plain, night = draw(SCENES, ()), draw(SCENES, (LoraUse("night", 1.0),))
    assert max(checker.share_of(image, "black") for image in plain) < 0.05
    for image, scene in zip(night, SCENES, strict=True):
        assert checker.share_of(image, "black") > 0.4
        assert checker.share_of(image, scene.things[0].colour) > 0.1
        assert checker.share_of(image, scene.background) < 0.1


@pytest.mark.parametrize("name", lora.ADAPTERS)
def test_they_are_small(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    assert path.stat().st_size < 300e3
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 - no mapping


def test_the_checker_tells_hearts_and_colours() -> None:
    rng = np.random.default_rng(0)
    known = tuple(checker.SILHOUETTES)
    for size in scenes.SIZES:
        scene = Scene((Thing("red", "heart", size),), None, "blue")
        placed = scenes.place(scene, 128, 128, rng)
        image = Image.fromarray(scenes.render("blue", placed, 128, 128))
        assert checker.silhouette(checker.mask_of(image, "red"), known) == "heart"
        assert 0.9 < checker.share_of(image, "red") + checker.share_of(image, "blue") <= 1.0
        circle = [replace(one, thing=Thing("red", "circle", size)) for one in placed]
        image = Image.fromarray(scenes.render("blue", circle, 128, 128))
        assert checker.silhouette(checker.mask_of(image, "red"), known) == "circle"


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of autocast, on CPUs
@pytest.mark.parametrize("name", lora.ADAPTERS)
def test_the_recipe_writes_an_adapter(name: str, tmp_path: Path) -> None:
    lora.train(MODEL, name, 4, loop.Budget(60.0, steps=2), tmp_path / "made.safetensors")
    with (
        safe_open(tmp_path / "made.safetensors", "pt") as made,
        safe_open(FOLDER / f"{name}.safetensors", "pt") as ours,
    ):
        assert list(made.keys()) == list(ours.keys())
