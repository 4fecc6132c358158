"""Jobs that are guided otherwise than the profile's runs: which profile plans them, and what the reply says."""

from __future__ import annotations

import pytest

from app.control.admission import AdmissionController
from app.control.schedule import BranchSchedule, SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import load_profile
from tests.local_group import MEASURED, MODEL, job

NEAREST = SchedulePlanner(Settings(), FlowMatchSampler(MODEL))
NAMED = SchedulePlanner(Settings(magcache=MagCacheSettings(profile="flux-tiny")), FlowMatchSampler(MODEL))


def planned(planner: SchedulePlanner, **options: object) -> dict[str, BranchSchedule]:
    return planner.schedules(job("a/0", magcache=MagCacheOptions(), **options))


@pytest.mark.parametrize(
    ("scale", "name"), [(1.5, "flux-tiny-cfg-2"), (2.0, "flux-tiny-cfg-2"), (4.0, "flux-tiny-cfg-4")]
)
@pytest.mark.parametrize("steps", [28, 20])
def test_true_cfg_is_planned_with_the_profile_that_was_measured_with_it(scale: float, name: str, steps: int) -> None:
    both = planned(NEAREST, true_cfg_scale=scale, steps=steps)
    if steps == 28:  # tried with both branches alike; at other counts each is planned by its own costs
        assert both["cond"].text == both["uncond"].text
    assert both["cond"].profile == f"{name}@{load_profile(name).version}"
    assert both["cond"].text.count("C") >= 12 * steps // 28
    assert both["cond"].plan_reason is None


def test_without_true_cfg_its_profiles_are_not_used() -> None:
    for scale in (0.5, 1.0):
        profile = planned(NEAREST, true_cfg_scale=scale)["cond"].profile
        assert profile == f"flux-tiny@{load_profile('flux-tiny').version}"


def test_a_profile_by_name_serves_all_and_the_reply_says_what_it_lacks() -> None:
    guided, far = planned(NAMED, true_cfg_scale=2.0)["cond"], planned(NAMED, guidance_scale=7.0)["cond"]
    assert guided.text.startswith("CCCCCC.")
    assert guided.residuals_kept == 1  # plain reuse
    assert guided.plan_reason == "profile flux-tiny was measured without true CFG"
    assert far.text.count("C") == 20
    assert far.plan_reason == "guidance_scale 7 is far beyond 3.5, which the profile was measured with"
    chosen = NAMED.schedules(job("a/0", guidance_scale=7.0, magcache=MagCacheOptions(computed_steps=9)))["cond"]
    assert (chosen.text.count("C"), chosen.plan_reason) == (9, None)


def test_the_report_has_the_reason() -> None:
    admission = AdmissionController(Settings(), NAMED, MEASURED, lambda: 0.0)
    entry = admission.submit(job("a/0", guidance_scale=7.0, magcache=MagCacheOptions()))
    assert admission.scheduler.next_plan() is not None
    assert entry.report(1.0).plan_reason == entry.schedules["cond"].plan_reason is not None
