"""The quality guard's budgets in a job decide its schedule, unless the job has its own."""

from __future__ import annotations

import pytest

from app.control.quality import computed_steps
from app.control.schedule import SchedulePlanner
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import ImageKind, MagCacheOptions
from app.settings import MagCacheSettings, Settings
from magcache_core import load_profile
from tests.local_group import MODEL, job

PROFILE = load_profile("flux-tiny")
LABEL = f"{PROFILE.name}@{PROFILE.version}"
GUIDED = load_profile("flux-tiny-cfg-4")
GUIDED_LABEL = f"{GUIDED.name}@{GUIDED.version}"
PLANNER = SchedulePlanner(Settings(), FlowMatchSampler(MODEL))


def computed(budget: int, kind: ImageKind, steps: int = 28, true_cfg_scale: float = 1.0, **options: object) -> int:
    chosen = MagCacheOptions(guard_budgets=((kind, budget),), **options)
    return computed_steps(PLANNER.schedules(job("a/0", steps=steps, true_cfg_scale=true_cfg_scale, magcache=chosen)))


@pytest.mark.parametrize(
    ("budget", "kind", "request_", "expected"),
    [
        (13, ImageKind(LABEL, 28, guided=False), {}, 13),
        (13, ImageKind(GUIDED_LABEL, 28, guided=True), {"true_cfg_scale": 3.0}, 13),
        # Of another kind: what the profile recommends.
        (13, ImageKind(LABEL, 28, guided=True), {}, 10),
        (13, ImageKind("flux-tiny@0", 28, guided=False), {}, 10),
        (13, ImageKind(LABEL, 20, guided=False), {}, 10),
        # A number of steps asked for goes before it, as when a deadline lowers it; bounds hold.
        (13, ImageKind(LABEL, 28, guided=False), {"computed_steps": 8}, 8),
        (7, ImageKind(LABEL, 28, guided=False), {"mag_max_skip_steps": 1}, 14),
        (13, ImageKind(LABEL, 28, guided=False), {"mag_threshold": 0.24}, 13),
    ],
)
def test_a_budget_holds_for_its_kind(budget: int, kind: ImageKind, request_: dict[str, object], expected: int) -> None:
    assert computed(budget, kind, **request_) == expected


def test_equal_jobs_share_a_schedule_whatever_the_budgets_of_other_kinds() -> None:
    other = MagCacheOptions(guard_budgets=((ImageKind("other@0", 28, guided=False), 9),))
    plain, held = (PLANNER.schedules(job("a/0", magcache=options)) for options in (MagCacheOptions(), other))
    assert plain["cond"] is held["cond"]


def test_without_a_profile_every_step_computes() -> None:
    settings = Settings(model="acme/other", magcache=MagCacheSettings())
    planner = SchedulePlanner(settings, FlowMatchSampler(MODEL))
    options = MagCacheOptions(guard_budgets=((ImageKind(LABEL, 28, guided=False), 13),))
    assert planner.schedules(job("a/0", magcache=options))["cond"].text == "C" * 28
