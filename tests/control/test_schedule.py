"""What a job's options become: shares of the steps as numbers of them, with the profile that the plan follows."""

from __future__ import annotations

import pytest

from app.control.schedule import SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.errors import InvalidRequestError
from app.messages import MagCacheOptions
from app.settings import Settings
from magcache_core import fewest_steps, load_profile
from tests.local_group import MODEL, job

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
