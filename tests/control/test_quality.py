"""A deadline lowers the computed steps no further than it must, and never below the floor."""

from __future__ import annotations

import pytest

from app.errors import DeadlineImpossibleError
from app.messages.jobs import MagCacheOptions
from magcache_core import choose, load_profile
from tests.control.simulated_ranks import DEFAULT, FLOOR, calibrated, image


def test_a_deadline_costs_as_little_quality_as_it_must() -> None:
    ranks = calibrated()
    usual = ranks.submit(image("usual"))
    ranks.run()
    ranks.submit(image("urgent", deadline_s=0.85 * usual.eta_s))
    ranks.run()
    report = ranks.finished["urgent/0"].report
    assert report.lowered_by == "deadline"
    assert FLOOR <= report.computed < ranks.finished["usual/0"].report.computed
    assert report.schedule == choose(load_profile("flux-tiny"), 28, budget=report.computed).schedule
    assert ranks.finished["urgent/0"].seconds <= 0.85 * usual.eta_s
    # One more computed step would have missed the aim.
    more = ranks.submit(image("more", magcache=MagCacheOptions(computed_steps=report.computed + 1)))
    assert more.eta_s > 0.9 * 0.85 * usual.eta_s
    assert ranks.admission.counts.lowered_by_deadline == 1


def test_a_deadline_with_time_to_spare_changes_nothing() -> None:
    ranks = calibrated()
    ranks.submit(image("a", deadline_s=60.0))
    ranks.run()
    assert ranks.finished["a/0"].report.lowered_by is None
    assert ranks.finished["a/0"].report.schedule == choose(load_profile("flux-tiny"), 28).schedule


@pytest.mark.parametrize(
    ("options", "floor"),
    [
        (DEFAULT, FLOOR),
        (MagCacheOptions(min_computed_steps=9), 9),
        (MagCacheOptions(min_computed_steps=2), FLOOR),  # the server's floor holds
        (MagCacheOptions(computed_steps=12, client_chose=True), 12),
        (MagCacheOptions(computed_steps=12, min_computed_steps=8, client_chose=True), 8),
        (MagCacheOptions(computed_share=0.4, client_chose=True), 12),
        (MagCacheOptions(mag_threshold=0.05), FLOOR),  # the server's own
        (MagCacheOptions(mag_threshold=0.05, client_chose=True), None),
        (MagCacheOptions(mag_threshold=0.05, min_computed_steps=10, client_chose=True), 10),
        (MagCacheOptions(enabled=False), 28),
        (MagCacheOptions(enabled=False, min_computed_steps=20), 20),
    ],
)
def test_a_schedule_is_lowered_to_its_floor_and_no_further(options: MagCacheOptions, floor: int | None) -> None:
    ranks = calibrated()
    usual = ranks.submit(image("usual", magcache=options))
    ranks.run()
    computed = ranks.finished["usual/0"].report.computed
    with pytest.raises(DeadlineImpossibleError) as caught:
        ranks.submit(image("a", magcache=options, deadline_s=1e-3))
    ranks.submit(image("b", magcache=options, deadline_s=caught.value.soonest_s * 1.001))
    ranks.run()
    report = ranks.finished["b/0"].report
    assert report.computed == (computed if floor is None else floor)
    assert (report.lowered_by is None) == (report.computed == computed)
    assert (caught.value.soonest_s == pytest.approx(usual.eta_s, rel=1e-3)) == (report.computed == computed)
