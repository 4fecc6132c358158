"""Deadlines, the bounded queue and quality under load, on ranks whose steps take a known time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.control.admission import default_job
from app.errors import BusyError, DeadlineImpossibleError, InvalidRequestError
from app.messages.jobs import MagCacheOptions
from app.settings import ElasticSettings, KeySettings, Settings
from magcache_core import ConfigError, fewest_steps, load_profile
from tests.control.simulated_ranks import DEFAULT, FLOOR, TINY, SimulatedRanks, calibrated, image

USUAL = load_profile("flux-tiny").budget
"""Computed steps of 28 when a request says nothing."""


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


def test_a_check_refuses_as_a_submission_would_and_takes_nothing() -> None:
    ranks = calibrated(with_(max_batch_rows=1, max_waiting_pictures=1))
    ranks.admission.check(image("asked"))
    assert ranks.admission.scheduler.empty
    with pytest.raises(DeadlineImpossibleError):
        ranks.admission.check(image("late", deadline_s=0.01))
    ranks.submit(image("runs"))
    ranks.tick()
    ranks.admission.check(image("asked"))
    ranks.submit(image("waits"))
    with pytest.raises(BusyError):
        ranks.admission.check(image("refused"))
    assert (ranks.admission.counts.refused, ranks.admission.counts.deadline_impossible) == (1, 1)
    ranks.run()
    assert {"runs/0", "waits/0"} <= ranks.finished.keys()
    assert not {"asked/0", "late/0", "refused/0"} & ranks.finished.keys()


def test_a_check_does_not_count_against_its_key() -> None:
    ranks = calibrated(with_(keys=KeySettings(megapixel_steps_per_minute=0.1)))
    asked = replace(image("asked"), key_name="one")
    for _ in range(9):
        ranks.admission.check(asked)
    ranks.submit(asked)
    with pytest.raises(BusyError, match="megapixel-steps"):
        ranks.admission.check(replace(image("again"), key_name="one"))


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
