"""Inpainting against diffusers' pipeline of it on tiny random checkpoints, and with flux-tiny, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from app.components.source_encoder import SourceEncoder
from app.engine.engine import Engine
from app.engine.families import FLUX_DEV
from app.engine.geometry import Geometry
from app.engine.process_groups import RankGroups
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan, chained
from app.settings import Settings
from magcache_core import Decision, Plan, apply_mag_cache, decisions, remove_mag_cache
from tests.engine.models import TinyModel, image, plans, run
from tests.local_group import decode, embed, execute, form, job, psnr
from tests.ranks import on_ranks, relative_error

SCHEDULE = "CCCC.C..C..."
MODES = ("residual", "linear", "corrected", "integrated")
SOURCE = image(96, 64, seed=1)
ASKED = job("a/0", size=(80, 64), steps=12, strength=0.75)


def soft_mask(width: int = 96, height: int = 64) -> Image.Image:
    """Not of whole latents, with every shade of grey at the edges."""
    coarse = Image.fromarray(np.random.default_rng(3).integers(0, 2, (3, 4), dtype=np.uint8) * 255)
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


MASK = soft_mask()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel("flux.1-dev", tmp_path_factory.mktemp("models") / "dev")


def decided(engine: Engine, asked: DenoiseJob, mode: str) -> dict[str, Sequence[Decision]]:
    """What follows ``SCHEDULE`` from the job's first step on."""
    first, tokens = asked.first_step, Geometry.of(asked.width, asked.height).tokens
    sigmas = engine.sampler.sigmas(asked.num_inference_steps, tokens)[first:].tolist()
    return dict.fromkeys(asked.branches, decisions(Plan(SCHEDULE[first:], mode), sigmas))


def kept(model: TinyModel, tensors: Conditioning, asked: DenoiseJob) -> torch.Tensor:
    """Where the mask keeps the source, (image_tokens, channels)."""
    (source,) = tensors.sources
    assert source.mask is not None
    rows, columns = source.mask.shape
    assert (rows, columns) == (asked.height // 8, asked.width // 8)
    by_token = source.mask.reshape(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    return ~by_token.repeat(1, source.latents.shape[1] // 4)


def check(model: TinyModel, asked: DenoiseJob, tensors: Conditioning, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert relative_error(ours, theirs) <= 1e-4
    assert psnr(model.decode(ours, asked), model.decode(theirs, asked)) >= 60
    outside = kept(model, tensors, asked)
    assert 0.1 < outside.float().mean() < 0.9
    assert torch.equal(ours[outside], tensors.sources[0].latents[outside]), "what is kept is the source exactly"


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("steps", "strength"), [(7, 0.6), (10, 0.3), (5, 1.0), (6, 0.05), (28, 0.85)])
def test_cache_off_equals_the_pipeline(model: TinyModel, steps: int, strength: float, scale: float) -> None:
    asked = replace(ASKED, num_inference_steps=steps, strength=strength, true_cfg_scale=scale)
    tensors = model.conditioning(asked, (SOURCE,), MASK)
    ours = run(Engine(model.folder), plans(asked), tensors)
    check(model, asked, tensors, ours, model.reference(asked, (SOURCE,), MASK))
    unmasked = run(Engine(model.folder), plans(asked), model.conditioning(asked, (SOURCE,)))
    assert relative_error(ours, unmasked) > 1e-3, "the mask must matter, or this test shows nothing"


@contextmanager
def in_contexts(transformer: Any, names: Sequence[str]) -> Iterator[None]:
    """Calls take turns in cache contexts of these names, which this pipeline does not set for its CFG branches."""
    hooked, turns = transformer.forward, cycle(names)

    def forward(**arguments: Any) -> Any:
        with transformer.cache_context(next(turns)):
            return hooked(**arguments)

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = hooked


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("mode", MODES)
def test_cache_on_equals_the_hooks_on_the_pipeline(model: TinyModel, mode: str, scale: float) -> None:
    """Among them the modes that correct a segment afterwards: the pipeline blends at each of its steps."""
    asked = replace(ASKED, true_cfg_scale=scale)
    assert (asked.first_step, asked.steps_to_run) == (3, 9)
    tensors = model.conditioning(asked, (SOURCE,), MASK)
    engine = Engine(model.folder)
    ours = run(engine, plans(asked, decided(engine, asked, mode)), tensors)
    apply_mag_cache(model.pipeline.transformer, Plan(SCHEDULE, mode))
    try:
        with in_contexts(model.pipeline.transformer, asked.branches):
            theirs = model.reference(asked, (SOURCE,), MASK)
    finally:
        remove_mag_cache(model.pipeline.transformer)
    check(model, asked, tensors, ours, theirs)
    uncached = run(Engine(model.folder), plans(asked), tensors)
    assert relative_error(ours, uncached) > 1e-3, "the cache must matter, or this test shows nothing"


@pytest.mark.parametrize("mode", [None, *MODES])
def test_previews_show_the_source_outside_the_mask(model: TinyModel, mode: str | None) -> None:
    """At computed and at reused steps."""
    tensors = model.conditioning(ASKED, (SOURCE,), MASK)
    outside = kept(model, tensors, ASKED)
    engine = Engine(model.folder)
    formed = plans(ASKED, mode and decided(engine, ASKED, mode), previews=range(ASKED.steps_to_run))
    shown = []
    for plan in formed:
        result = engine.execute(plan, [tensors for _ in plan.admit])
        shown.append(result.previews["a/0"])
        assert torch.equal(shown[-1][outside], tensors.sources[0].latents[outside])
    distances = [float((one - result.latents["a/0"]).norm()) for one in shown]
    assert distances[0] > 5 * distances[-1], "estimates inside the mask approach the image"


def test_neighbours_without_masks_share_the_batch(model: TinyModel) -> None:
    """An image from a prompt, image-to-image, and two inpainted by different masks, of equal shapes: each as alone."""
    shape = {"size": (80, 64), "steps": 9}
    edit = {**shape, "steps": 12, "strength": 0.75}
    jobs = [
        job("a/0", **shape, seed=1), job("b/0", **edit, seed=2), job("c/0", **edit, seed=3), job("d/0", **edit, seed=4)
    ]  # fmt: skip
    masks = (None, None, MASK, MASK.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    tensors = {
        one.row_id: model.conditioning(one, (SOURCE,) if one.strength else (), mask)
        for one, mask in zip(jobs, masks, strict=True)
    }
    engine = Engine(model.folder)
    follows = [None, decided(engine, jobs[1], "corrected"), decided(engine, jobs[2], "corrected"), None]
    formed = [plans(one, follow) for one, follow in zip(jobs, follows, strict=True)]
    together = chained(
        StepPlan(0, "", tuple(jobs) if step == 0 else (), tuple(row for plan in at_once for row in plan.rows))
        for step, at_once in enumerate(zip(*formed, strict=True))
    )
    for plan in together:
        made = engine.execute(plan, [tensors[one.row_id] for one in plan.admit]).latents
    for one, alone in zip(jobs, formed, strict=True):
        engine.restart()
        expected = run(engine, alone, tensors[one.row_id])
        torch.testing.assert_close(made[one.row_id], expected, rtol=1e-4, atol=1e-5)
    assert relative_error(made["c/0"], made["d/0"]) > 0.1


def test_the_mask_counts_among_the_bytes_that_travel(model: TinyModel) -> None:
    with_mask, without = (model.conditioning(ASKED, (SOURCE,), mask) for mask in (MASK, None))
    assert with_mask.nbytes - without.nbytes == 10 * 8


def _run_all(groups: RankGroups, folder: Path, work: list[list[StepPlan]], tensors: Conditioning) -> list[torch.Tensor]:
    return [run(Engine(folder, groups), formed, tensors) for formed in work]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["tensor", "sequence", "branches"])
def test_two_ranks_make_the_same(model: TinyModel, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    asked = replace(ASKED, true_cfg_scale=2.0)
    tensors = model.conditioning(asked, (SOURCE,), MASK)
    engine = Engine(model.folder)
    work = [plans(asked), *(plans(asked, decided(engine, asked, mode)) for mode in ("residual", "corrected"))]
    made = on_ranks(sizes, tmp_path, _run_all, model.folder, work, tensors)
    theirs = model.reference(asked, (SOURCE,), MASK)
    check(model, asked, tensors, made[0], theirs)
    outside = kept(model, tensors, asked)
    for formed, ours in zip(work[1:], made[1:], strict=True):
        engine.restart()
        assert relative_error(ours, run(engine, formed, tensors)) <= 1e-4
        assert torch.equal(ours[outside], tensors.sources[0].latents[outside])


def test_bfloat16_is_rounded_where_the_pipeline_rounds_it(model: TinyModel, tmp_path: Path) -> None:
    """Far closer to the pipeline in bfloat16 than that is to float32."""
    half = TinyModel("flux.1-dev", tmp_path / "bfloat16", torch.bfloat16)
    theirs = half.reference(ASKED, (SOURCE,), MASK).float()
    tensors = half.conditioning(ASKED, (SOURCE,), MASK)
    ours = run(Engine(half.folder, dtype=torch.bfloat16), plans(ASKED), tensors).float()
    assert (ours - theirs).norm() <= 0.4 * (theirs - model.reference(ASKED, (SOURCE,), MASK)).norm()


def square() -> tuple[np.ndarray, np.ndarray]:
    """A red square on blue, and a mask around it."""
    before = np.full((128, 128, 3), (35, 70, 225), dtype=np.uint8)
    before[40:88, 40:88] = (220, 40, 40)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[16:112, 16:112] = 255
    return before, mask


def test_flux_tiny_repaints_inside_and_keeps_outside(engine: Engine, pipeline: FluxPipeline) -> None:
    """With its own profile, which corrects velocities: inside as near to the uncached image as image-to-image is."""
    before, mask = square()
    inside = np.s_[24:104, 24:104]
    encoder, prompt = SourceEncoder(pipeline.vae, FLUX_DEV), embed(pipeline, "a green circle on a blue background")
    sources = {"inpainted": encoder.encode(before, 128, 128, mask), "whole": encoder.encode(before, 128, 128)}
    nearness: dict[str, list[float]] = {name: [] for name in sources}
    for seed in range(4):
        for name, source in sources.items():
            asked = job("a/0", seed=seed, strength=0.9)
            images = {}
            for enabled in (True, False):
                one = replace(asked, magcache=MagCacheOptions(enabled))
                formed = form([one], Settings())
                assert ("." in formed.entries["a/0"].schedules["cond"].text) == enabled
                engine.restart()
                made = execute(engine, formed.plans, {"a/0": Conditioning(prompt, None, (source,))})["a/0"]
                images[enabled] = decode(pipeline, made, one)
            nearness[name].append(psnr(images[True][inside], images[False][inside]))
        green, blue = images[True][64, 64], images[True][4, 64]
        assert green[1] > 0.5 > green[0], "the circle is painted"
        assert blue[2] > 0.8 > blue[0]
    assert np.mean(nearness["inpainted"]) >= np.mean(nearness["whole"]) - 1


def test_outside_the_image_is_what_the_vae_makes_of_the_source(engine: Engine, pipeline: FluxPipeline) -> None:
    before, mask = square()
    source = SourceEncoder(pipeline.vae, FLUX_DEV).encode(before, 128, 128, mask)
    asked = job("a/0", strength=1.0, magcache=MagCacheOptions(True))
    tensors = Conditioning(embed(pipeline, "a green circle on a blue background"), None, (source,))
    made = execute(engine, form([asked], Settings()).plans, {"a/0": tensors})["a/0"]
    ours, back = decode(pipeline, made, asked), decode(pipeline, source.latents, asked)
    outside = mask == 0
    exact = psnr(back[outside], before[outside] / 255)
    assert exact > 45
    assert psnr(ours[outside], before[outside] / 255) >= exact - 3
    assert psnr(ours[~outside], back[~outside]) < 15, "the mask's inside must change, or this test shows nothing"
