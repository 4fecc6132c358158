from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import FluxPipeline

from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.engine import Engine
from app.errors import PlanMismatchError
from app.messages.conditioning import Conditioning
from app.messages.jobs import MagCacheOptions
from app.messages.plans import BranchStep, RowStep, StepPlan, chained
from app.settings import MagCacheSettings, Settings
from tests.local_group import embed, job, plans

PROMPT = "a red circle on a blue background"
NEGATIVE = "a green square on a yellow background"


@pytest.fixture(scope="module")
def prompt(pipeline: FluxPipeline) -> Conditioning:
    return Conditioning(embed(pipeline, PROMPT))


@pytest.fixture(scope="module")
def both(pipeline: FluxPipeline) -> Conditioning:
    return Conditioning(embed(pipeline, PROMPT), embed(pipeline, NEGATIVE))


def test_a_lost_repeated_or_altered_plan_is_an_error(engine: Engine, prompt: Conditioning) -> None:
    first, second, third = plans([job("a/0", steps=3)])
    engine.execute(first, [prompt])
    with pytest.raises(PlanMismatchError, match="expected plan 1"):
        engine.execute(third)
    with pytest.raises(PlanMismatchError, match="got plan 0"):
        engine.execute(first, [prompt])
    computes = second.rows[0].branches[0]
    other = replace(second, rows=(replace(second.rows[0], branches=(replace(computes, compute=False),)),))
    with pytest.raises(PlanMismatchError, match="with digest"):
        engine.execute(other)
    engine.execute(second)  # what was refused left no trace
    assert set(engine.execute(third).latents) == {"a/0"}


def test_reusing_what_was_never_computed_is_an_error(engine: Engine, prompt: Conditioning) -> None:
    step = RowStep("a/0", 0, (BranchStep("cond", False, (1.0,)),))
    (plan,) = chained([StepPlan(0, "", (job("a/0"),), (step,))])
    with pytest.raises(LookupError, match=r"row a/0 \(cond\) has 0 residuals, the plan reuses 1"):
        engine.execute(plan, [prompt])


def test_dropping_a_row_frees_its_residuals(engine: Engine, both: Conditioning) -> None:
    settings = Settings(magcache=MagCacheSettings(profile="flux.1-dev"))
    planner = SchedulePlanner(settings, engine.sampler)
    scheduler = StepScheduler(settings)
    cached = MagCacheOptions(True)
    for name in ("a/0", "b/0"):
        one = job(name, true_cfg_scale=2.0, magcache=cached)
        scheduler.submit(one, planner.schedules(one))
    result = engine.execute(scheduler.next_plan(), [both, both])
    per_row = 2 * 64 * 192 * 4  # two branches of 64 tokens x 192 channels in float32
    assert result.residual_bytes == 2 * per_row
    assert scheduler.cancel("a/0")
    assert engine.execute(scheduler.next_plan()).residual_bytes == per_row
    assert scheduler.cancel("b/0")
    assert engine.execute(scheduler.next_plan()).residual_bytes == 0
    assert not engine.rows


def test_a_row_without_reuse_keeps_no_residual(engine: Engine, prompt: Conditioning) -> None:
    first, *_ = plans([job("a/0")])
    assert engine.execute(first, [prompt]).residual_bytes == 0
