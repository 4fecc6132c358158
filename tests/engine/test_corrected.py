"""Predicted and corrected velocities in the engine against a slow loop on diffusers' pipelines, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.engine import Engine
from app.engine.geometry import Geometry
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import BranchStep, RowStep, StepPlan, chained
from app.settings import MagCacheSettings, Settings
from magcache_core import VELOCITY_MODES, Decision, Plan, decisions, load_profile, write_profile
from tests.engine.models import TinyModel, image, plans, run
from tests.local_group import job
from tests.magcache_core.slow_corrector import SlowRun
from tests.magcache_core.slow_least_squares import SlowLeastSquares, products

SCHEDULE = "C..C.C...CC."
IMAGE = image(80, 64, seed=1)
CASES: dict[str, tuple[str, DenoiseJob, Sequence[Image.Image]]] = {
    "flux.1-dev": ("flux.1-dev", job("a/0", size=(64, 80), steps=12), ()),
    "image to image": ("flux.1-dev", job("a/0", size=(80, 64), steps=20, strength=0.6), (IMAGE,)),
    "true CFG": ("flux.1-dev", job("a/0", size=(64, 64), steps=12, true_cfg_scale=2.0), ()),
    "reference": ("flux.1-kontext-dev", job("a/0", size=(64, 80), steps=12), (IMAGE,)),
    "flux.2 references": ("flux.2-klein-4b", job("a/0", size=(96, 96), steps=12), (IMAGE, image(64, 64, seed=2))),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    return {name: TinyModel(name, folder / name) for name in {name for name, _, _ in CASES.values()}}


def levels(engine: Engine, asked: DenoiseJob) -> list[float]:
    tokens = Geometry.of(asked.width, asked.height).tokens
    return engine.sampler.sigmas(asked.num_inference_steps, tokens)[asked.first_step :].tolist()


def decided(engine: Engine, asked: DenoiseJob, mode: str, schedule: str = SCHEDULE) -> dict[str, Sequence[Decision]]:
    known = products(len(schedule)) if mode == "least_squares" else ()
    return dict.fromkeys(asked.branches, decisions(Plan(schedule, mode, products=known), levels(engine, asked)))


def slow(
    model: TinyModel, asked: DenoiseJob, images: Sequence[Image.Image], sigmas: list[float], mode: str
) -> tuple[torch.Tensor, list[list[torch.Tensor]], int]:
    """Diffusers' pipeline with its transformer answering so that its Euler steps follow the slow loop.

    Returns:
        The finished tokens; the estimates by branch and step; and how often the transformer ran.
    """
    transformer = model.pipeline.transformer
    original = transformer.forward
    runs = [
        SlowLeastSquares(sigmas, SCHEDULE)
        if mode == "least_squares"
        else SlowRun(sigmas, SCHEDULE, mode == "integrated")
        for _ in asked.branches
    ]
    tokens = Geometry.of(asked.width, asked.height).tokens
    ran = 0

    def answer(**arguments: Any) -> tuple[torch.Tensor]:
        nonlocal ran
        slowest = min(runs, key=lambda one: one.step)  # the branches are called in turns, the conditional one first
        step = slowest.step
        latents = arguments["hidden_states"]

        def velocity() -> torch.Tensor:
            nonlocal ran
            ran += 1
            return original(**arguments)[0][:, :tokens]

        after = slowest.advance(latents[:, :tokens], velocity)
        euler = torch.zeros_like(latents)
        euler[:, :tokens] = (after - latents[:, :tokens].double()) / (sigmas[step + 1] - sigmas[step])
        return (euler,)

    transformer.forward = answer
    try:
        finished = model.reference(asked, images)
    finally:
        transformer.forward = original
    return finished, [[estimate[0] for estimate in one.estimates] for one in runs], ran


@pytest.mark.parametrize("mode", VELOCITY_MODES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_loop_on_diffusers_transformer(case: str, mode: str, models: dict[str, TinyModel]) -> None:
    name, asked, images = CASES[case]
    model = models[name]
    engine = Engine(model.folder)
    expected, _, ran = slow(model, asked, images, levels(engine, asked), mode)
    assert ran == len(asked.branches) * SCHEDULE.count("C")
    made = run(engine, plans(asked, decided(engine, asked, mode)), model.conditioning(asked, images))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    uncached = run(engine, _restarted(engine, plans(asked)), model.conditioning(asked, images))
    assert (made - uncached).norm() > 20 * (made - expected).norm(), "the oracle must tell them apart"


@pytest.mark.parametrize("mode", ["corrected", "least_squares"])
def test_previews_are_the_slow_loops_estimates_at_computed_and_reused_steps(
    mode: str, models: dict[str, TinyModel]
) -> None:
    model = models["flux.1-dev"]
    asked = CASES["flux.1-dev"][1]
    engine = Engine(model.folder)
    _, (estimates,), _ = slow(model, asked, (), levels(engine, asked), mode)
    wanted = range(11)
    conditioning = model.conditioning(asked)
    for plan in plans(asked, decided(engine, asked, mode), wanted):
        shown = engine.execute(plan, [conditioning for _ in plan.admit]).previews
        step = plan.rows[0].step
        assert set(shown) == ({"a/0"} if step in wanted else set())
        for preview in shown.values():
            torch.testing.assert_close(preview, estimates[step].float(), rtol=1e-4, atol=1e-4)


def test_neighbours_with_other_modes_and_schedules_change_nothing(models: dict[str, TinyModel]) -> None:
    model = models["flux.1-dev"]
    engine = Engine(model.folder)
    jobs = [replace(CASES["flux.1-dev"][1], row_id=f"{letter}/0", seed=seed) for seed, letter in enumerate("abcde")]
    follows = [
        decided(engine, jobs[0], "corrected"),
        decided(engine, jobs[1], "linear", "CC.C..C.C.C."),
        decided(engine, jobs[2], "integrated", "CC.C..C.C.C."),
        decided(engine, jobs[3], "least_squares", "CC.CC.C.C.C."),
        None,
    ]
    formed = [plans(one, follow) for one, follow in zip(jobs, follows, strict=True)]
    alone = {
        one.row_id: run(engine, _restarted(engine, one_formed), model.conditioning(one))
        for one, one_formed in zip(jobs, formed, strict=True)
    }
    both = chained(
        StepPlan(0, "", tuple(jobs) if step == 0 else (), tuple(row for plan in at_once for row in plan.rows))
        for step, at_once in enumerate(zip(*formed, strict=True))
    )
    engine.restart()
    for plan in both:
        latents = engine.execute(plan, [model.conditioning(one) for one in plan.admit]).latents
    for row_id, expected in alone.items():
        torch.testing.assert_close(latents[row_id], expected, rtol=1e-4, atol=1e-5)


def _restarted(engine: Engine, formed: list[StepPlan]) -> list[StepPlan]:
    engine.restart()
    return formed


@pytest.mark.parametrize(("mode", "kept"), [("corrected", 3), ("least_squares", 4)])
def test_a_reused_step_runs_nothing_and_no_more_velocities_are_kept_than_are_weighed(
    mode: str, kept: int, models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["flux.1-dev"]
    engine = Engine(model.folder)
    asked = CASES["flux.1-dev"][1]
    calls: list[str] = []
    for part in ("embed_image", "project", "blocks"):
        original = getattr(engine.strategy, part)
        monkeypatch.setattr(
            engine.strategy, part, lambda *a, part=part, original=original: (calls.append(part), original(*a))[1]
        )
    conditioning = model.conditioning(asked)
    velocity = 20 * engine.transformer.config.in_channels * 4  # tokens x channels in float32
    computed = 0
    for plan, mark in zip(plans(asked, decided(engine, asked, mode)), SCHEDULE, strict=True):
        calls.clear()
        result = engine.execute(plan, [conditioning for _ in plan.admit])
        assert calls.count("project") == calls.count("blocks") == (mark == "C")
        assert bool(calls) == (mark == "C")
        computed += mark == "C"
        assert result.residual_bytes == (0 if plan.rows[0].last else min(computed, kept) * velocity)


def test_weighing_velocities_that_were_never_computed_is_an_error(models: dict[str, TinyModel]) -> None:
    model = models["flux.1-dev"]
    asked = CASES["flux.1-dev"][1]
    step = RowStep("a/0", 0, (BranchStep("cond", True, (), 0),), move=(0.1, 0.2), estimate=(1.0, 1.0))
    (plan,) = chained([StepPlan(0, "", (asked,), (step,))])
    with pytest.raises(LookupError, match="row a/0 has 1 velocities, the plan weighs 2"):
        Engine(model.folder).execute(plan, [model.conditioning(asked)])


def test_a_profile_that_recommends_it_is_followed_but_not_under_true_cfg(
    models: dict[str, TinyModel], tmp_path: Path
) -> None:
    path = tmp_path / "corrected.json"
    write_profile(replace(load_profile("flux-tiny"), reuse="corrected", budget=5, trials=()), path)
    engine = Engine(models["flux.1-dev"].folder)
    settings = Settings(magcache=MagCacheSettings(profile=str(path)))
    planner = SchedulePlanner(settings, engine.sampler)
    asked = replace(CASES["flux.1-dev"][1], magcache=MagCacheOptions(True))
    plain, guided = planner.schedules(asked), planner.schedules(replace(asked, true_cfg_scale=2.0))
    assert guided["cond"].text == guided["uncond"].text
    assert plain["cond"].residuals_kept == 0
    assert guided["cond"].residuals_kept == 1
    for schedules, corrects in ((plain, True), (guided, False)):
        scheduler = StepScheduler(settings)
        scheduler.submit(asked, schedules)
        rows = [plan.rows[0] for plan in iter(scheduler.next_plan, None)]
        for row, mark in zip(rows, schedules["cond"].text, strict=True):
            assert bool(row.estimate) == corrects
            assert bool(row.move) == (corrects and mark == "C")
            assert [branch.runs for branch in row.branches] == [mark == "C" or not corrects] * len(schedules)
