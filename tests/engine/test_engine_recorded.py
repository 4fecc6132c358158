"""Rows that are recorded, against the same calibration of diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from app.engine.engine import Engine
from app.engine.process_groups import RankGroups
from app.messages.calibration import CalibrationRun
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.settings import Settings
from magcache_core.calibrate import CalibrationJob, calibrate
from magcache_core.profile_data import Profile
from magcache_core.run_sums import BranchSums
from tests.local_group import MODEL, TEXT_TOKENS, embed, form, job
from tests.ranks import on_ranks

STEPS = 6
SIZE = (64, 64)
PROMPTS = ("a red circle on a blue background", "a green square")
RECORD = CalibrationRun("C" * STEPS, record=True)
SCALE = 4.0


def recorded(
    engine: Engine, prompts: list[PromptEmbeddings], negative: PromptEmbeddings | None = None
) -> dict[str, BranchSums]:
    """The sums of one recorded row per prompt, one after another, by branch; under true CFG with a negative prompt."""
    sums: dict[str, BranchSums] = {}
    scale = 1.0 if negative is None else SCALE
    for number, prompt in enumerate(prompts):
        asked = job(f"run/{number}", size=SIZE, steps=STEPS, seed=0, calibration=RECORD, true_cfg_scale=scale)
        grams = {branch: before.gram for branch, before in sums.items()}
        engine.restart()
        for plan in form([asked], Settings()).plans:
            result = engine.execute(plan, [Conditioning(prompt, negative, grams=grams)] if plan.admit else [])
            assert (asked.row_id in result.sums) == (plan.rows[0].last and engine.groups.rank == 0)
            assert result.residual_bytes >= 0
        if engine.groups.rank == 0:
            measured = result.sums[asked.row_id]
            sums = {branch: sums[branch] + one if sums else one for branch, one in measured.items()}
    return sums


def record_on_rank(
    groups: RankGroups, prompts: list[PromptEmbeddings], negative: PromptEmbeddings | None = None
) -> dict[str, BranchSums]:
    return recorded(Engine(MODEL, groups), prompts, negative)


@pytest.fixture(scope="module")
def expected(pipeline: FluxPipeline) -> Profile:
    asked = CalibrationJob(PROMPTS, STEPS, *SIZE, max_sequence_length=TEXT_TOKENS)
    return calibrate(pipeline, asked, "flux-tiny", "flux-tiny", progress=False)


@pytest.fixture(scope="module")
def guided(pipeline: FluxPipeline) -> Profile:
    asked = CalibrationJob(
        PROMPTS, STEPS, *SIZE, negative_prompt="", true_cfg_scale=SCALE, max_sequence_length=TEXT_TOKENS
    )
    return calibrate(pipeline, asked, "flux-tiny", "flux-tiny", progress=False)


def check_all(found: dict[str, BranchSums], expected: Profile) -> None:
    assert set(found) == set(expected.branches)
    for branch, sums in found.items():
        check(sums, expected, branch)


def check(sums: BranchSums, expected: Profile, branch: str) -> None:
    curve, costs = expected.branch(branch), expected.branch(branch).costs
    assert costs is not None
    found = sums.curve(costs.sensitivity.tolist())
    assert found.costs is not None
    assert sums.rows == len(PROMPTS)
    assert found.norm_ratios == pytest.approx(curve.norm_ratios, rel=1e-3)
    assert found.cos_dises == pytest.approx(curve.cos_dises, abs=1e-4)
    torch.testing.assert_close(found.costs.gram, costs.gram, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.costs.velocities, costs.velocities, rtol=1e-4, atol=1e-2)
    for mode, table in costs.segments.items():
        torch.testing.assert_close(found.costs.segments[mode], table, rtol=5e-3, atol=1e-3)
        torch.testing.assert_close(found.costs.pairwise[mode], costs.pairwise[mode], rtol=5e-3, atol=1e-3)


def test_one_rank_measures_what_the_calibration_of_a_pipeline_does(
    engine: Engine, pipeline: FluxPipeline, expected: Profile
) -> None:
    check_all(recorded(engine, [embed(pipeline, prompt) for prompt in PROMPTS]), expected)


def test_under_true_cfg_it_does_too(engine: Engine, pipeline: FluxPipeline, guided: Profile) -> None:
    prompts, negative = [embed(pipeline, prompt) for prompt in PROMPTS], embed(pipeline, "")
    check_all(recorded(engine, prompts, negative), guided)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 1, 2)])
def test_and_two_that_share_weights_or_branches(
    tmp_path: Path, pipeline: FluxPipeline, guided: Profile, sizes: tuple[int, int, int]
) -> None:
    prompts, negative = [embed(pipeline, prompt) for prompt in PROMPTS], embed(pipeline, "")
    check_all(on_ranks(sizes, tmp_path, record_on_rank, prompts, negative), guided)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_so_do_two_that_share_weights_tokens_or_branches(
    tmp_path: Path, pipeline: FluxPipeline, expected: Profile, sizes: tuple[int, int, int]
) -> None:
    prompts = [embed(pipeline, prompt) for prompt in PROMPTS]
    check_all(on_ranks(sizes, tmp_path, record_on_rank, prompts), expected)


def test_a_recorded_row_makes_the_uncached_image(engine: Engine, pipeline: FluxPipeline) -> None:
    conditioning = Conditioning(embed(pipeline, PROMPTS[0]))
    made = {}
    for row_id, options in (("plain/0", {}), ("recorded/0", {"calibration": RECORD})):
        engine.restart()
        for plan in form([job(row_id, size=SIZE, steps=STEPS, **options)], Settings()).plans:
            made |= engine.execute(plan, [conditioning] if plan.admit else []).latents
    assert torch.equal(made["plain/0"], made["recorded/0"])
    assert not engine.rows
