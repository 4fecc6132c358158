"""Every family against diffusers' pipeline of its own, on tiny random checkpoints in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from app.control.schedule import SchedulePlanner
from app.engine.engine import Engine
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import apply_mag_cache, choose, decisions, fill, load_profile, remove_mag_cache
from tests.engine.models import TinyModel, image, plans, run, together
from tests.local_group import job, psnr

ModelOf = Callable[[str], TinyModel]
WIDE, TALL = image(96, 64, seed=1), image(64, 80, seed=2)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    made: dict[str, TinyModel] = {}

    def model(name: str) -> TinyModel:
        if name not in made:
            made[name] = TinyModel(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return model


def check_equal(model: TinyModel, asked: DenoiseJob, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).norm() / theirs.norm() <= 1e-4
    assert psnr(model.decode(ours, asked), model.decode(theirs, asked)) >= 60


CASES = [
    ("flux.1-dev", job("a/0", size=(96, 64), steps=5), ()),
    ("flux.1-dev", job("a/0", size=(64, 64), steps=4, true_cfg_scale=2.5), ()),
    ("flux.1-schnell", job("a/0", size=(64, 96), steps=4), ()),
    ("flux.1-kontext-dev", job("a/0", size=(96, 64), steps=4), ()),
    ("flux.1-kontext-dev", job("a/0", size=(64, 64), steps=4), (WIDE,)),
    ("flux.1-kontext-dev", job("a/0", size=(64, 96), steps=3, true_cfg_scale=3.0), (TALL,)),
    ("flux.2-klein-4b", job("a/0", size=(96, 64), steps=4), ()),
    ("flux.2-klein-4b", job("a/0", size=(96, 96), steps=4), (WIDE,)),
    ("flux.2-klein-4b", job("a/0", size=(128, 96), steps=4), (WIDE, TALL)),
    ("flux.2-klein-base", job("a/0", size=(64, 80), steps=5, true_cfg_scale=4.0), (TALL,)),
]
Images = tuple[Image.Image, ...]


@pytest.mark.parametrize(("name", "asked", "images"), CASES)
def test_cache_off_equals_its_pipeline(model_of: ModelOf, name: str, asked: DenoiseJob, images: Images) -> None:
    model = model_of(name)
    ours = run(Engine(model.folder), plans(asked), model.conditioning(asked, images))
    check_equal(model, asked, ours, model.reference(asked, images))
    if images:
        without = run(Engine(model.folder), plans(asked), model.conditioning(asked))
        assert (ours - without).norm() / ours.norm() > 1e-3, "the image must matter, or this test shows nothing"


@pytest.mark.parametrize("name", ["flux.1-kontext-dev", "flux.2-klein-4b"])
def test_bfloat16_is_rounded_where_the_pipeline_rounds_it(name: str, tmp_path: Path) -> None:
    """Far closer to the pipeline in bfloat16 than that is to float32."""
    asked = job("a/0", size=(64, 80), steps=4)
    exact = TinyModel(name, tmp_path / "float32").reference(asked, (TALL,))
    model = TinyModel(name, tmp_path / "bfloat16", torch.bfloat16)
    theirs = model.reference(asked, (TALL,)).float()
    ours = run(Engine(model.folder, dtype=torch.bfloat16), plans(asked), model.conditioning(asked, (TALL,))).float()
    assert (ours - theirs).norm() <= 0.4 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("name", "scale", "images"),
    [
        ("flux.1-dev", 2.5, ()),
        ("flux.1-kontext-dev", 1.0, (WIDE,)),
        ("flux.2-klein-base", 1.0, (WIDE, TALL)),
        ("flux.2-klein-base", 4.0, (TALL,)),
    ],
)
def test_cache_on_equals_the_hooks(model_of: ModelOf, name: str, scale: float, images: Images) -> None:
    """The hooks store the residual of all tokens, the engine that of the image's: the rest is never painted."""
    model = model_of(name)
    asked = job("a/0", size=(96, 96), steps=12, true_cfg_scale=scale)
    plan = choose(load_profile("flux.1-dev"), 12)
    assert 3 < plan.schedule.count("C") < 9
    engine = Engine(model.folder)
    decided = dict.fromkeys(asked.branches, decisions(plan, engine.sampler.sigmas(12, 36).tolist()))
    conditioning = model.conditioning(asked, images)
    ours = run(engine, plans(asked, decided), conditioning)
    apply_mag_cache(model.pipeline.transformer, plan)
    try:
        theirs = model.reference(asked, images)
    finally:
        remove_mag_cache(model.pipeline.transformer)
    check_equal(model, asked, ours, theirs)
    uncached = run(Engine(model.folder), plans(asked), conditioning)
    assert (ours - uncached).norm() / ours.norm() > 1e-3, "the cache must matter, or this test shows nothing"


def test_references_are_not_kept(model_of: ModelOf) -> None:
    model = model_of("flux.1-kontext-dev")
    asked = job("a/0", size=(64, 64), steps=3)
    first, *_ = plans(asked, {"cond": decisions(choose(load_profile("flux.1-dev"), 3))})
    result = Engine(model.folder).execute(first, [model.conditioning(asked, (WIDE,))])
    width = model.pipeline.transformer.inner_dim
    assert result.residual_bytes == 16 * width * torch.float32.itemsize


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("steps", "strength"), [(7, 0.6), (10, 0.3), (5, 1.0), (6, 0.05), (28, 0.999)])
def test_strength_equals_image_to_image(model_of: ModelOf, steps: int, strength: float, scale: float) -> None:
    model = model_of("flux.1-dev")
    asked = job("a/0", size=(64, 48), steps=steps, strength=strength, true_cfg_scale=scale)
    ours = run(Engine(model.folder), plans(asked), model.conditioning(asked, (WIDE,)))
    check_equal(model, asked, ours, model.reference(asked, (WIDE,)))


def test_strength_with_the_cache_equals_the_hooks(model_of: ModelOf) -> None:
    model = model_of("flux.1-dev")
    asked = job("a/0", size=(64, 48), steps=12, strength=0.7)
    assert (asked.first_step, asked.steps_to_run) == (3, 9)
    plan = fill(load_profile("flux.1-dev"), "CCCC.C...C.C", "residual")
    decided = {"cond": decisions(plan)[asked.first_step :]}
    ours = run(Engine(model.folder), plans(asked, decided), model.conditioning(asked, (WIDE,)))
    apply_mag_cache(model.pipeline.transformer, plan)
    try:
        theirs = model.reference(asked, (WIDE,))
    finally:
        remove_mag_cache(model.pipeline.transformer)
    check_equal(model, asked, ours, theirs)


def test_a_few_step_model_computes_every_step_and_says_why(model_of: ModelOf) -> None:
    folder = model_of("flux.2-klein-4b").folder
    asked = job("a/0", steps=4, magcache=MagCacheOptions(True))
    schedule = SchedulePlanner(Settings(model=str(folder)), FlowMatchSampler(folder)).schedules(asked)["cond"]
    assert (schedule.text, schedule.residuals_kept) == ("CCCC", 0)
    assert schedule.uncached_reason is not None
    assert schedule.uncached_reason.startswith("FLUX.2-klein is made for 4 steps")
    named = Settings(model=str(folder), magcache=MagCacheSettings(profile="flux.1-dev", mag_threshold=5.0))
    asked = job("a/0", steps=8, magcache=MagCacheOptions(True, mag_threshold=5.0))
    schedule = SchedulePlanner(named, FlowMatchSampler(folder)).schedules(asked)["cond"]
    assert "." in schedule.text, "a profile says otherwise"
    assert schedule.uncached_reason is None


@pytest.mark.parametrize("name", ["flux.1-kontext-dev", "flux.2-klein-4b"])
def test_images_with_and_without_references_share_a_rank(model_of: ModelOf, name: str) -> None:
    """Equal shapes share a forward pass, others stand beside it; nobody sees a neighbour's reference."""
    model = model_of(name)
    sources: list[Images] = [(WIDE,), (image(96, 64, seed=5),), (), (TALL,)]
    jobs = [job(f"{index}/0", size=(96, 96), steps=2, seed=index) for index in range(len(sources))]
    tensors = {one.row_id: model.conditioning(one, images) for one, images in zip(jobs, sources, strict=True)}
    engine = Engine(model.folder)
    made: dict[str, torch.Tensor] = {}
    for plan in together(jobs):
        made |= engine.execute(plan, [tensors[one.row_id] for one in plan.admit]).latents
    assert not engine.rows
    for one in jobs:
        alone = run(Engine(model.folder), plans(one), tensors[one.row_id])
        assert (made[one.row_id] - alone).norm() / alone.norm() <= 1e-4
