"""What a schedule promises: the PSNR that trials let expect, and the floor that a preset stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.control.quality import ScheduleSelector
from app.control.schedule import BranchSchedule, SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import load_profile, save_profile
from tests.local_group import MODEL, job

PLANNER = SchedulePlanner(Settings(), FlowMatchSampler(MODEL))


def scheduled(options: MagCacheOptions, **fields: object) -> BranchSchedule:
    return PLANNER.schedules(job("a/0", magcache=options, **fields))["cond"]


def preset(floor_db: float | None, **options: object) -> MagCacheOptions:
    return MagCacheOptions(computed_share=0.5, floor_db=floor_db, client_chose=True, **options)


@pytest.mark.parametrize(
    ("floor_db", "options", "fields", "computed", "promised"),
    [
        (28.0, {}, {}, 3, 28.0),
        (56.0, {}, {}, 7, 56.0),
        (65.0, {}, {}, 11, 65.0),
        (80.0, {}, {}, 14, None),  # no trial got there
        (None, {}, {}, 14, None),
        # Not what was tried: another number of steps, true CFG, image-to-image, other bounds.
        (56.0, {}, {"steps": 20}, 10, None),
        (56.0, {}, {"true_cfg_scale": 2.0}, 14, None),
        (56.0, {}, {"strength": 0.5}, 7, None),
        (56.0, {"mag_max_skip_steps": 3}, {}, 14, None),
        (56.0, {"mag_retention_ratio": 0.1}, {}, 14, None),
    ],
)
def test_a_preset_is_the_budget_whose_trial_reached_its_floor_or_a_share(
    floor_db: float | None, options: dict[str, object], fields: dict[str, object], computed: int, promised: float | None
) -> None:
    found = scheduled(preset(floor_db, **options), **fields)
    assert (found.text.count("C"), found.floor_db) == (computed, promised)
    if promised is not None:
        assert found.predicted_psnr_db is not None
        assert found.predicted_psnr_db >= promised


def test_a_lowered_schedule_promises_no_floor() -> None:
    asked = job("a/0", magcache=preset(65.0, min_computed_steps=4))
    selector = ScheduleSelector(MagCacheSettings(min_computed_share=0.1), PLANNER)
    choice = selector.choose(asked, 1.0, None, lambda schedules: 0.0)
    found = choice.schedules["cond"]
    assert (choice.lowered_by, found.text.count("C"), found.floor_db) == ("load", 4, None)
    assert found.predicted_psnr_db == pytest.approx(43.4, abs=0.1)


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        (MagCacheOptions(), {}, 62.8),
        (MagCacheOptions(computed_steps=12), {}, 66.0),
        (MagCacheOptions(computed_steps=9), {"steps": 20}, 63.8),  # read off by its predicted error
        (MagCacheOptions(enabled=False), {}, None),
        (MagCacheOptions(), {"true_cfg_scale": 2.0}, None),
        (MagCacheOptions(), {"strength": 0.5}, None),
    ],
)
def test_a_schedule_is_expected_to_reach_what_trials_say(
    options: MagCacheOptions, fields: dict[str, object], expected: float | None
) -> None:
    found = scheduled(options, **fields).predicted_psnr_db
    assert found is None if expected is None else found == pytest.approx(expected, abs=1.0)


def test_trials_without_true_cfg_say_nothing_of_it(tmp_path: Path) -> None:
    path = save_profile(replace(load_profile("flux-tiny"), name="linear", reuse="linear", budget=3), tmp_path)
    planner = SchedulePlanner(Settings(magcache=MagCacheSettings(profile=str(path))), FlowMatchSampler(MODEL))
    plain, guided = (
        planner.schedules(job("a/0", magcache=MagCacheOptions(), true_cfg_scale=scale))["cond"] for scale in (1.0, 2.0)
    )
    assert (plain.predicted_psnr_db, guided.predicted_psnr_db) == (pytest.approx(35.8, abs=0.1), None)
