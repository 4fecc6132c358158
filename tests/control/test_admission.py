"""Estimates, deadlines, the bounded queue and quality under load, on ranks whose steps take a known time."""

from __future__ import annotations

import random

import pytest

from app.control.admission import default_job
from app.errors import BusyError, DeadlineImpossibleError, InvalidRequestError
from app.messages import DenoiseJob, MagCacheOptions
from app.settings import ElasticSettings, Settings
from magcache_core import ConfigError, choose, fewest_steps, load_profile
from tests.control.simulated_ranks import TINY, SimulatedRanks, step_seconds
from tests.local_group import job

DEFAULT = MagCacheOptions()
USUAL = load_profile("flux-tiny").budget
"""Computed steps of 28 when a request says nothing."""
FLOOR = 7
"""A quarter of 28 steps."""


def image(name: str, **options) -> DenoiseJob:
    return job(f"{name}/0", **{"magcache": DEFAULT, **options})


def calibrated(settings: Settings = TINY) -> SimulatedRanks:
    """Ranks that have made an image of each kind."""
    ranks = SimulatedRanks(settings)
    for index, options in enumerate([{}, {"true_cfg_scale": 2.0}, {"size": (160, 96)}, {"size": (256, 256)}]):
        ranks.submit(image(f"first{index}", **options))
        ranks.run()
    return ranks


def with_(**values) -> Settings:
    return Settings(**{**{name: getattr(TINY, name) for name in TINY.model_fields_set}, **values})


def test_the_first_images_estimate_and_deadline_are_as_good_as_any() -> None:
    ranks = SimulatedRanks()
    with pytest.raises(DeadlineImpossibleError) as caught:
        ranks.submit(image("a", deadline_s=0.01))
    soonest = caught.value.soonest_s
    entry = ranks.submit(image("b", deadline_s=soonest * 1.01))
    ranks.run()
    assert entry.lowered_by == "deadline"
    assert ranks.finished["b/0"].seconds == pytest.approx(soonest, rel=0.01)


def test_one_pause_of_a_rank_does_not_shut_deadlines_out() -> None:
    pause: list[float] = []
    ranks = SimulatedRanks(seconds=lambda part: step_seconds(part) + (pause.pop() if pause else 0.0))
    before = ranks.submit(image("a")).eta_s
    pause.append(60.0)
    ranks.run()
    assert not pause
    assert ranks.submit(image("b")).eta_s == pytest.approx(before, rel=0.05)


def test_estimates_follow_ranks_that_became_slower() -> None:
    slower = 1.0
    ranks = SimulatedRanks(seconds=lambda part: slower * step_seconds(part))
    ranks.submit(image("a"))
    ranks.run()
    slower = 3.0
    for name in "bcde":
        ranks.submit(image(name))
        ranks.run()
    entry = ranks.submit(image("f"))
    ranks.run()
    assert entry.eta_s == pytest.approx(ranks.finished["f/0"].seconds, rel=0.02)


@pytest.mark.parametrize(
    "options", [{}, {"true_cfg_scale": 2.0}, {"size": (256, 256)}, {"magcache": MagCacheOptions(False)}]
)
def test_a_lone_images_estimate_is_exact(options) -> None:
    ranks = calibrated()
    entry = ranks.submit(image("a", **options))
    ranks.run()
    assert entry.eta_s == pytest.approx(ranks.finished["a/0"].seconds, rel=0.05)


def test_estimates_hold_in_a_full_queue() -> None:
    """Bursts of unlike images: each is done about when it was told, once batches of this kind were measured."""
    ranks = calibrated()
    draw = random.Random(1)

    def burst(name: str) -> list[float]:
        entries = [
            ranks.submit(
                image(
                    f"{name}{number}",
                    size=draw.choice([(128, 128), (160, 96)]),
                    steps=draw.randint(10, 40),
                    true_cfg_scale=draw.choice([1.0, 1.0, 2.0]),
                )
            )
            for number in range(60)
        ]
        assert {entry.position for entry in entries[:8]} == {0}
        assert [entry.position for entry in entries[8:]] == list(range(9, 61))
        ranks.run()
        return [entry.eta_s / ranks.finished[entry.job.row_id].seconds for entry in entries]

    # What the first in a burst are told cannot know of those behind them.
    unseen, seen = burst("a"), burst("b")
    assert all(0.6 <= ratio <= 1.6 for ratio in unseen[20:]), unseen
    assert all(0.75 <= ratio <= 1.25 for ratio in seen[20:]), seen
    assert all(0.9 <= ratio <= 1.1 for ratio in seen[40:]), seen


def test_estimates_of_running_images_come_true() -> None:
    ranks = calibrated()
    entries = [ranks.submit(image(str(number), steps=20 + number)) for number in range(6)]
    for _ in range(8):
        ranks.tick()
    told = {entry.job.row_id: ranks.now_s + ranks.admission.eta_s(entry) for entry in entries}
    ranks.run()
    for row_id, done_s in told.items():
        assert done_s == pytest.approx(ranks.finished[row_id].seconds + entries[0].submitted_s, rel=0.1)


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


def test_an_impossible_deadline_is_refused_at_once_with_the_soonest_time() -> None:
    ranks = calibrated()
    with pytest.raises(DeadlineImpossibleError, match=r"deadline_s is 0\.01") as caught:
        ranks.submit(image("a", deadline_s=0.01))
    assert ranks.admission.scheduler.empty
    soonest = caught.value.soonest_s
    entry = ranks.submit(image("b", deadline_s=soonest * 1.01))
    ranks.run()
    assert entry.lowered_by == "deadline"
    assert ranks.finished["b/0"].report.computed == FLOOR
    assert ranks.finished["b/0"].seconds == pytest.approx(soonest, rel=0.01)
    assert ranks.admission.counts.deadline_impossible == 1


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


def test_what_waited_too_long_is_lowered_when_it_is_admitted() -> None:
    """At its arrival it had time; then urgent ones went first."""
    ranks = calibrated(with_(max_batch_rows=1))
    alone = ranks.submit(image("a")).eta_s
    late = ranks.submit(image("late", deadline_s=2.6 * alone))
    assert late.lowered_by is None
    ranks.submit(image("first", priority=5))
    ranks.run()
    assert ranks.finished["late/0"].report.lowered_by == "deadline"
    assert ranks.finished["late/0"].seconds <= 2.6 * alone
    assert ranks.too_late == []


def test_a_full_queue_says_when_there_is_room() -> None:
    ranks = calibrated(with_(max_batch_rows=2, max_waiting_pictures=4))
    for number in range(2):
        ranks.submit(image(f"runs{number}"))
    ranks.tick()
    for number in range(4):
        ranks.submit(image(f"waits{number}"))
    retry_s = []
    for number in range(3):
        with pytest.raises(BusyError) as caught:
            ranks.submit(image(f"refused{number}"))
        retry_s.append(caught.value.retry_after_s)
    assert retry_s == sorted(retry_s)
    assert retry_s[2] > retry_s[0] > 0
    asked_s = ranks.now_s
    for number, wait_s in enumerate(retry_s):
        ranks.run(until_s=asked_s + wait_s * 1.05)
        ranks.submit(image(f"again{number}"))
    assert ranks.admission.counts.refused == 3


def test_load_lowers_quality_before_anybody_is_refused() -> None:
    elastic = ElasticSettings(enabled=True, start_wait_s=0.5, full_wait_s=3.0)
    ranks = calibrated(with_(elastic=elastic, max_batch_rows=2, max_waiting_pictures=40))
    explicit = MagCacheOptions(computed_steps=14, client_chose=True)
    allowed = MagCacheOptions(computed_steps=14, min_computed_steps=12, client_chose=True)
    for number in range(41):
        options = explicit if number == 20 else allowed if number == 30 else DEFAULT
        ranks.submit(image(str(number), magcache=options))
        if number < 2:
            ranks.tick()
    ranks.submit(image("41"))
    with pytest.raises(BusyError):
        ranks.submit(image("42"))
    ranks.run()
    reports = {row_id.partition("/")[0]: done.report for row_id, done in ranks.finished.items()}
    assert reports["0"].computed == reports["1"].computed == USUAL
    assert reports["0"].lowered_by is None
    middle = reports["10"]
    assert (middle.computed, middle.lowered_by) == (FLOOR, "load")
    assert (reports["20"].computed, reports["20"].lowered_by) == (14, None)
    assert 12 <= reports["30"].computed < 14
    assert (reports["40"].computed, reports["40"].lowered_by) == (USUAL, None), "by then the queue was short"
    assert ranks.admission.counts.lowered_by_load >= 20


def test_nothing_is_lowered_where_elastic_is_off() -> None:
    ranks = calibrated(with_(max_batch_rows=1))
    for number in range(100):
        ranks.submit(image(str(number), steps=4))
    ranks.run()
    assert all(done.report.lowered_by is None for done in ranks.finished.values())


def test_what_cannot_be_made_is_refused_with_its_field() -> None:
    ranks = SimulatedRanks()
    least = fewest_steps(load_profile("flux-tiny"), 28)
    with pytest.raises(ConfigError, match=f"an integer from {least} to 28"):
        ranks.submit(image("a", magcache=MagCacheOptions(computed_steps=1)))
    with pytest.raises(InvalidRequestError, match=r"4680 tokens.*max_batch_tokens is 2304"):
        ranks.submit(image("b", size=(256, 256), source_tokens=2052, true_cfg_scale=2.0))
    assert ranks.admission.scheduler.empty


def test_the_load_is_what_a_new_request_would_meet() -> None:
    ranks = calibrated(with_(max_batch_rows=1))
    idle = ranks.admission.load(default_job(TINY))
    assert (idle["waiting"], idle["running"]) == (0, 0)
    for number in range(3):
        ranks.submit(image(str(number)))
        ranks.tick()
    busy = ranks.admission.load(default_job(TINY))
    assert (busy["waiting"], busy["running"]) == (2, 1)
    assert busy["eta_s"] > 3 * idle["eta_s"] > 0


def test_counts_split_the_time_of_mixed_plans() -> None:
    ranks = calibrated()
    before = ranks.admission.counts.computed_seconds, ranks.admission.counts.reused_seconds, ranks.now_s
    for number in range(4):
        ranks.submit(image(str(number), steps=20 + number))
    ranks.run()
    computed = ranks.admission.counts.computed_seconds - before[0]
    reused = ranks.admission.counts.reused_seconds - before[1]
    assert computed + reused == pytest.approx(ranks.now_s - before[2])
    assert 0 < reused < computed


def test_what_reuse_saved_is_what_computing_would_have_taken_longer() -> None:
    ranks = calibrated()
    ranks.submit(image("all", magcache=MagCacheOptions(False)))
    ranks.run()
    saved, started = ranks.admission.counts.saved_seconds, ranks.now_s
    ranks.submit(image("some"))
    ranks.run()
    saved = ranks.admission.counts.saved_seconds - saved
    taken, in_full = ranks.now_s - started, ranks.finished["all/0"].seconds
    assert saved == pytest.approx(in_full - taken, rel=0.05)
