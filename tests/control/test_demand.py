"""What the service calibrates by itself."""

from __future__ import annotations

from dataclasses import replace

from app.control.demand import MOST_KINDS, OFTEN, CalibrationDemand, Measurable
from app.settings import Settings
from magcache_core import BranchCurve, Profile, load_profile

SETTINGS = Settings(model="models/flux-tiny")
DEFAULT = Measurable(28, 128, 128, 3.5)
OTHER = Measurable(20, 256, 256, 7.0)
MEASURED = load_profile("flux-tiny")
RATIOS_ONLY = replace(MEASURED, branches={"cond": BranchCurve(MEASURED.ratios)})


def for_kind(kind: Measurable) -> Profile:
    ratios = (1.0,) * kind.steps
    return replace(
        RATIOS_ONLY,
        steps=kind.steps,
        width=kind.width,
        height=kind.height,
        guidance_scale=kind.guidance_scale,
        sigmas=(),
        branches={"cond": BranchCurve(ratios, costs=MEASURED.branch().costs)},
    )


def test_the_default_image_comes_first_if_nothing_was_measured_for_it() -> None:
    demand = CalibrationDemand(SETTINGS)
    assert demand.next([], 6) == demand.next([RATIOS_ONLY], 6) == DEFAULT
    assert demand.next([MEASURED], 6) is None
    assert CalibrationDemand(Settings(model="models/other")).next([MEASURED], 6) == DEFAULT


def test_then_what_is_asked_for_most_and_often() -> None:
    demand = CalibrationDemand(SETTINGS)
    demand.note(OTHER, OFTEN - 1)
    assert demand.next([MEASURED], 6) is None
    demand.note(OTHER, 1)
    more = replace(OTHER, steps=12)
    demand.note(more, OFTEN + 1)
    demand.note(replace(OTHER, steps=5), 10 * OFTEN)
    assert demand.next([MEASURED], 6) == more, "five steps are too few to reuse any"
    assert demand.next([MEASURED, for_kind(more)], 6) == OTHER
    assert demand.next([MEASURED, for_kind(more), for_kind(OTHER)], 6) is None
    assert demand.next([], 6) == DEFAULT


def test_true_cfg_wants_a_profile_of_its_own() -> None:
    demand = CalibrationDemand(SETTINGS)
    guided = replace(DEFAULT, true_cfg_scale=4.0)
    demand.note(guided, OFTEN)
    assert demand.next([MEASURED], 6) == guided
    assert demand.next([MEASURED, replace(MEASURED, true_cfg_scale=4.5)], 6) is None, "about the same scale"
    assert demand.next([MEASURED, replace(MEASURED, true_cfg_scale=2.0)], 6) == guided
    assert CalibrationDemand(SETTINGS).next([MEASURED], 6, default_true_cfg=4.0) == guided, "the model's default image"


def test_what_failed_is_left_alone() -> None:
    demand = CalibrationDemand(SETTINGS)
    demand.give_up(DEFAULT)
    assert demand.next([], 6) is None


def test_the_rarest_kinds_are_forgotten() -> None:
    demand = CalibrationDemand(SETTINGS)
    demand.note(OTHER, OFTEN)
    for guidance in range(5 * MOST_KINDS):
        demand.note(replace(OTHER, guidance_scale=100.0 + guidance), 1)
    assert demand.next([MEASURED], 6) == OTHER
    assert len(demand._asked) <= MOST_KINDS
