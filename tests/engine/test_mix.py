"""Random mixes of requests through the real table and the real engine: no image depends on the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.engine.engine import Engine
from app.engine.process_groups import RankGroups
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.settings import MagCacheSettings, Settings
from magcache_core import choose, load_profile
from tests.local_group import MODEL, Formed, decode, embed, execute, form, job, psnr, random_conditioning
from tests.ranks import on_ranks, relative_error

PROFILE = load_profile("flux-tiny")
CHANNELS, LATENT_CHANNELS = 192, 64
"""Of flux-tiny: its inner width, and what it predicts per token; in float32."""

job_options = st.fixed_dictionaries(
    {
        "size": st.sampled_from([(128, 128), (160, 96), (64, 64)]),
        "steps": st.integers(1, 10),
        "seed": st.integers(0, 2**63 - 1),
        "true_cfg_scale": st.sampled_from([1.0, 1.0, 3.0]),
        "magcache": st.one_of(
            st.just(MagCacheOptions()),
            st.builds(MagCacheOptions, st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 5.0])),
            st.just(MagCacheOptions(mag_threshold=0.5, mag_max_skip_steps=2, mag_retention_ratio=0.4)),
        ),
        "priority": st.integers(0, 2),
    }
)
arrival = st.integers(0, 6)
cancellation = st.none() | st.none() | st.integers(0, 12)


def limits(rows: int, tokens: int) -> Settings:
    return Settings(
        magcache=MagCacheSettings(profile="flux-tiny"), max_batch_rows=rows, max_batch_tokens=tokens, patience_s=20.0
    )


@pytest.fixture(scope="module")
def conditionings(pipeline: FluxPipeline) -> list[Conditioning]:
    prompt, negative = (embed(pipeline, text) for text in ("a red circle on a blue background", "a green square"))
    return [Conditioning(prompt), Conditioning(prompt, negative)]


def expected_bytes(formed: Formed, taken: dict[str, int]) -> int:
    """Memory of what rows under way must hold after ``taken`` steps, told from their schedules."""
    total = 0
    for row_id, steps in taken.items():
        entry = formed.entries[row_id]
        for schedule in entry.schedules.values():
            computed = schedule.text[:steps].count("C")
            kept = min(computed, schedule.residuals_kept) * CHANNELS
            if schedule.decisions[0].velocity is not None:
                kept = min(computed, 3) * LATENT_CHANNELS
            total += kept * entry.shape.geometry.tokens * 4
    return total


def execute_and_check(engine: Engine, formed: Formed, conditioning: dict[str, Conditioning]) -> dict[str, torch.Tensor]:
    """Latents by row id; after each plan the engine holds what the schedules say, and no residual of any other row."""
    latents: dict[str, torch.Tensor] = {}
    taken: dict[str, int] = {}
    for plan in formed.plans:
        result = engine.execute(plan, [conditioning[one.row_id] for one in plan.admit])
        for row_id in plan.drop:
            del taken[row_id]
        for row in plan.rows:
            taken[row.row_id] = row.step + 1
            if row.last:
                del taken[row.row_id]
        assert set(engine.rows) == set(taken)
        assert result.residual_bytes == expected_bytes(formed, taken)
        latents |= result.latents
    return latents


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mix=st.lists(st.tuples(job_options, arrival, cancellation), min_size=2, max_size=6),
    rows=st.integers(1, 6),
    tokens=st.sampled_from([576, 700, 2304]),
)
def test_an_image_does_not_depend_on_its_neighbours(pipeline, conditionings, mix, rows, tokens) -> None:
    jobs = [job(f"{index}/0", **options) for index, (options, _, _) in enumerate(mix)]
    conditioning = {one.row_id: conditionings[len(one.branches) - 1] for one in jobs}
    leaving = {f"{index}/0": tick for index, (_, _, tick) in enumerate(mix) if tick is not None}
    formed = form(jobs, limits(rows, tokens), [tick for _, tick, _ in mix], leaving)
    engine = Engine(MODEL)
    latents = execute_and_check(engine, formed, conditioning)

    assert set(latents) >= {one.row_id for one in jobs} - set(leaving)
    assert not engine.rows
    assert formed.admission.scheduler.empty
    for one in jobs:
        entry = formed.entries[one.row_id]
        for branch, schedule in entry.schedules.items():
            assert schedule.text == library_schedule(one, branch)
        if one.row_id in latents:
            alone = execute(Engine(MODEL), form([one], limits(1, 576)).plans, conditioning)
            first, second = (decode(pipeline, each[one.row_id], one) for each in (latents, alone))
            assert psnr(first, second) >= 55


def library_schedule(asked: DenoiseJob, branch: str) -> str:
    options = asked.magcache
    if not options.enabled:
        return "C" * asked.num_inference_steps
    return choose(
        PROFILE,
        asked.num_inference_steps,
        branch=branch,
        threshold=options.mag_threshold,
        max_skip_steps=options.mag_max_skip_steps,
        retention_ratio=options.mag_retention_ratio,
        guidance_scale=asked.guidance_scale,
        true_cfg_scale=asked.true_cfg_scale,
    ).schedule


def test_cancelling_frees_the_rows_residuals_at_the_next_step(conditionings: list[Conditioning]) -> None:
    """Two images with plain reuse, one of them with two branches; that one is cancelled before the fourth plan."""
    plain = MagCacheOptions(mag_threshold=0.24)
    jobs = [job("a/0", magcache=plain), job("b/0", magcache=plain, true_cfg_scale=2.0, size=(160, 96))]
    conditioning = {"a/0": conditionings[0], "b/0": conditionings[1]}
    settings_ = Settings(magcache=MagCacheSettings(profile="flux.1-dev"))
    formed = form(jobs, settings_, cancellations={"b/0": 3})
    engine = Engine(MODEL)
    held = [
        engine.execute(plan, [conditioning[one.row_id] for one in plan.admit]).residual_bytes
        for plan in formed.plans[:4]
    ]
    assert formed.plans[3].drop == ("b/0",)
    first, second = 64 * CHANNELS * 4, 2 * 60 * CHANNELS * 4
    assert held == [first + second] * 3 + [first]


def mixed_plans() -> tuple[list[StepPlan], dict[str, Conditioning]]:
    """A fixed mix: sizes, step counts, CFG, reuse modes, a full batch, a cancelled image."""
    jobs = [
        job("a/0", steps=10, magcache=MagCacheOptions()),
        job("b/0", steps=12, size=(160, 96), magcache=MagCacheOptions(mag_threshold=0.4)),
        job("c/0", steps=8, true_cfg_scale=2.0, magcache=MagCacheOptions()),
        job("d/0", steps=9, magcache=MagCacheOptions(), priority=1),
        job("e/0", steps=6, size=(64, 64)),
    ]
    conditioning = {one.row_id: random_conditioning(one, seed) for seed, one in enumerate(jobs)}
    return form(jobs, limits(4, 576), [0, 1, 2, 4, 4], {"b/0": 7}).plans, conditioning


def _execute_mix(groups: RankGroups) -> dict[str, torch.Tensor]:
    engine = Engine(MODEL, groups)
    latents = execute(engine, *mixed_plans())
    assert not engine.rows
    return latents


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    sharded = on_ranks((2, 1, 1), tmp_path, _execute_mix)
    whole = _execute_mix(RankGroups())
    assert sharded.keys() == whole.keys() == {"a/0", "c/0", "d/0", "e/0"}
    for row_id, expected in whole.items():
        assert relative_error(sharded[row_id], expected) <= 1e-5
