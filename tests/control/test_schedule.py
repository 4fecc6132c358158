"""What a job's options become: shares of the steps as numbers of them, with the profile that the plan follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.control.admission import AdmissionController
from app.control.schedule import BranchSchedule, SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.errors import InvalidRequestError
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import fewest_steps, load_profile, save_profile, stored_profiles
from tests.control.scheduling import DEV_PLANNER, ON
from tests.local_group import MEASURED, MODEL, job

PLANNER = SchedulePlanner(Settings(), FlowMatchSampler(MODEL))


def computed(share: float, steps: int = 28, strength: float | None = None, **options: object) -> int:
    asked = job("a/0", steps=steps, strength=strength, magcache=MagCacheOptions(computed_share=share, **options))
    return PLANNER.schedules(asked)["cond"].text.count("C")


@pytest.mark.parametrize(
    ("share", "steps", "options", "expected"),
    [
        (0.25, 28, {}, 7),
        (0.4, 28, {}, 12),
        (0.65, 28, {}, 19),
        (0.25, 1, {}, 1),
        (0.25, 100, {}, 25),
        (0.1, 30, {}, 3),  # not 4, whatever 0.1 is in binary
        # Not the share, but the fewest that the request's other settings allow.
        (0.25, 28, {"mag_max_skip_steps": 1}, 14),
        (0.25, 28, {"mag_retention_ratio": 0.5}, 15),
        (0.25, 28, {"min_computed_steps": 5}, 7),
    ],
)
def test_a_share_is_a_number_of_steps(share: float, steps: int, options: dict[str, object], expected: int) -> None:
    assert computed(share, steps, **options) == expected


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("share", [0.25, 0.4, 0.65])
def test_a_share_of_an_edit_is_of_the_steps_that_run_and_always_possible(share: float, strength: float) -> None:
    asked = job("a/0", strength=strength)
    most = computed(share, strength=strength)
    assert most >= share * asked.steps_to_run
    # The fewest are those of the end of the curve of all 28 steps, which the plan follows.
    fewest = fewest_steps(load_profile("flux-tiny").tail(asked.first_step, 28), asked.steps_to_run)
    assert most == max(-(-round(share * asked.steps_to_run * 1e6) // 10**6), fewest)


def test_a_floor_above_the_share_is_refused_by_its_own_name() -> None:
    with pytest.raises(
        InvalidRequestError, match="is 8, above the 7 steps that the request's quality computes"
    ) as error:
        computed(0.25, min_computed_steps=8)
    assert error.value.param == "magcache.min_computed_steps"


def test_without_a_profile_a_share_is_ignored_and_the_reason_given() -> None:
    planner = SchedulePlanner(Settings(model="acme/other"), FlowMatchSampler(MODEL))
    schedule = planner.schedules(job("a/0", magcache=MagCacheOptions(computed_share=0.25)))["cond"]
    assert schedule.text == "C" * 28
    assert schedule.uncached_reason is not None


@pytest.mark.parametrize(
    ("profile", "steps", "options", "schedule"),
    [
        ("flux.1-dev", 28, ON, "CCC..C...C.C.....C.....C..C."),
        ("flux.1-dev", 50, ON, "CCCCC.C..C...C...C..C.....C.....C.....C.....C..C.."),
        ("flux.1-dev-vllm-omni", 28, ON, "CCC..C...C....C.....C.....C."),
        ("flux.1-dev", 28, MagCacheOptions(False), "C" * 28),
        # The curve has ratios of exactly 1, which no threshold forbids.
        ("flux.1-dev", 28, MagCacheOptions(True, mag_threshold=0.0), "CCCCCCCCCCCCCC.C.C..CCCCCCCC"),
        ("flux.1-dev", 28, MagCacheOptions(True, mag_max_skip_steps=0), "C" * 28),
        ("flux.1-dev", 28, MagCacheOptions(True, mag_retention_ratio=1.0), "C" * 28),
    ],
)
def test_trajectories_follow_the_profile_and_the_request(profile, steps, options, schedule) -> None:
    planner = SchedulePlanner(Settings(magcache=MagCacheSettings(profile=profile)), FlowMatchSampler(MODEL))
    both = planner.schedules(job("a/0", steps=steps, magcache=options, true_cfg_scale=2.0))
    assert {name: schedule.text for name, schedule in both.items()} == {"cond": schedule, "uncond": schedule}
    assert both["cond"].residuals_kept == (1 if "." in schedule else 0)


def test_image_to_image_follows_the_end_of_the_curve() -> None:
    late = DEV_PLANNER.schedules(job("a/0", strength=0.5, magcache=ON))["cond"]
    assert late.text == "C.....C.....C."  # of 28 steps the last 14; the curve's beginning would be CCC..C...
    assert [decision.step for decision in late.decisions] == list(range(14))


def stored(tmp_path: Path, **changes: Any) -> Settings:
    """Settings whose profile folder has flux-tiny's as measured for other requests."""
    save_profile(replace(load_profile("flux-tiny"), **({"name": "own"} | changes)), tmp_path)
    return Settings(magcache=MagCacheSettings(profile="flux-tiny", profile_dir=str(tmp_path)))


def test_a_stored_profile_goes_before_a_named_one_for_what_it_was_measured_for(tmp_path: Path) -> None:
    planner = SchedulePlanner(stored(tmp_path, budget=8), FlowMatchSampler(MODEL))

    def planned(**options: Any) -> BranchSchedule:
        return planner.schedules(job("a/0", magcache=MagCacheOptions(), **options))["cond"]

    own, named = planned(), planned(guidance_scale=5.0)
    assert (own.text.count("C"), named.text.count("C")) == (8, 10)
    assert own.profile == f"own@{stored_profiles(tmp_path)[0].version}"
    assert named.profile == f"flux-tiny@{load_profile('flux-tiny').version}"
    assert planned(steps=20).profile == planned(size=(256, 256)).profile == named.profile
    assert planner.schedules(job("a/0"))["cond"].profile is None


def test_without_a_named_profile_a_stored_one_serves_what_is_near(tmp_path: Path) -> None:
    settings = stored(tmp_path, model="models/uncalibrated")
    settings = settings.model_copy(
        update={"model": "models/uncalibrated", "magcache": settings.magcache.model_copy(update={"profile": None})}
    )
    found = SchedulePlanner(settings, FlowMatchSampler(MODEL)).schedules(
        job("a/0", steps=20, magcache=MagCacheOptions())
    )
    assert found["cond"].profile is not None
    assert found["cond"].profile.startswith("own@")


def test_images_keep_the_profiles_that_they_came_with(tmp_path: Path) -> None:
    settings = stored(tmp_path, budget=8)
    admission = AdmissionController(settings, PLANNER, MEASURED, lambda: 0.0)
    before = admission.submit(job("before/0", magcache=MagCacheOptions()))
    admission.use(SchedulePlanner(settings, FlowMatchSampler(MODEL)))
    after = admission.submit(job("after/0", magcache=MagCacheOptions()))
    assert admission.scheduler.next_plan() is not None
    assert [entry.schedules["cond"].text.count("C") for entry in (before, after)] == [10, 8]
