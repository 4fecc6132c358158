"""API keys share a group: each gets its part of the work, whatever the others ask for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import MagCacheOptions
from app.settings import HttpSettings, MagCacheSettings, Settings
from tests.local_group import MODEL, job

EVERY_STEP = MagCacheOptions(enabled=False)
TINY = {"magcache": MagCacheSettings(profile="flux-tiny"), "http": HttpSettings(api_keys_file="keys")}
PLANNER = SchedulePlanner(Settings(**TINY), FlowMatchSampler(MODEL))


class Table:
    """A scheduler with room for one image at a time, each of which has one step or more."""

    def __init__(self, **options: object) -> None:
        self.now_s = 0.0
        self.scheduler = StepScheduler(Settings(max_batch_rows=1, **TINY, **options), lambda: self.now_s)
        self.served: list[str] = []
        self.waits: dict[str, list[int]] = {}
        self._submitted: dict[str, int] = {}

    def submit(self, key_name: str, name: str, **options: object) -> None:
        one = job(f"{key_name}-{name}/0", magcache=EVERY_STEP, key_name=key_name, **{"steps": 1, **options})
        self._submitted[one.row_id] = len(self.served)
        self.scheduler.submit(one, PLANNER.schedules(one))

    def serve(self) -> None:
        plan = self.scheduler.next_plan()
        self.now_s += 1.0
        for row in plan.rows if plan else ():
            if row.step == 0:
                key_name = row.row_id.partition("-")[0]
                self.waits.setdefault(key_name, []).append(len(self.served) - self._submitted[row.row_id])
                self.served.append(row.row_id)


def test_a_flood_does_not_delay_another_key() -> None:
    table = Table()
    for number in range(200):
        table.submit("flood", str(number))
    for number in range(50):
        table.submit("one", str(number))  # one image at a time, sent when the last is there
        while f"one-{number}/0" not in table.served:
            table.serve()
    assert max(table.waits["one"]) <= 1
    counts = Counter(row_id.partition("-")[0] for row_id in table.served)
    assert counts["flood"] >= counts["one"] - 1  # nor does the other key take all by being there again at once


@pytest.mark.parametrize("options", [{"priority": 10}, {"deadline_s": 3000.0, "priority": 10}, {"priority": -10}])
def test_no_priority_buys_the_share_of_another_key(options: dict[str, float]) -> None:
    table = Table()
    for number in range(100):
        table.submit("flood", str(number), **options)
        table.submit("fair", str(number))
    for _ in range(100):
        table.serve()
    counts = Counter(row_id.partition("-")[0] for row_id in table.served)
    assert counts == {"flood": 50, "fair": 50}


def test_within_a_key_the_more_urgent_goes_first_and_the_patient_is_not_forgotten() -> None:
    table = Table(patience_s=5.0)
    table.submit("a", "first")
    table.serve()
    table.submit("a", "patient")
    for number in range(60):
        table.submit("a", f"urgent{number}", priority=3)
        table.serve()
    place = table.served.index("a-patient/0")
    assert 15 <= place <= 18  # three levels of priority are 15 s of waiting, and an image takes one


def test_work_counts_and_not_images() -> None:
    table = Table()
    for number in range(100):
        table.submit("long", str(number), steps=4)
        table.submit("short", str(number), steps=1)
    for _ in range(200):
        table.serve()
    counts = Counter(row_id.partition("-")[0] for row_id in table.served)
    assert counts["short"] == pytest.approx(4 * counts["long"], abs=4)


def test_an_idle_key_saves_nothing_up() -> None:
    table = Table()
    for number in range(100):
        table.submit("busy", str(number))
    for _ in range(50):
        table.serve()
    for number in range(30):
        table.submit("late", str(number))
    table.served.clear()
    for _ in range(20):
        table.serve()
    assert Counter(row_id.partition("-")[0] for row_id in table.served) == {"busy": 10, "late": 10}


def test_without_keys_the_due_time_decides() -> None:
    settings = Settings(max_batch_rows=1, magcache=MagCacheSettings(profile="flux-tiny"))
    scheduler = StepScheduler(settings, lambda: 0.0)
    for name, priority in (("a", 0), ("b", 3), ("c", 1)):
        one = job(f"{name}/0", steps=1, magcache=EVERY_STEP, priority=priority)
        scheduler.submit(one, PLANNER.schedules(one))
    assert [entry.job.row_id for entry in scheduler.waiting_entries] == ["b/0", "c/0", "a/0"]


@settings(max_examples=60)
@given(keys=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_keys_with_work_waiting_get_equal_work(keys: int, seed: int) -> None:
    """Over any stretch in which all keys have images waiting, their work differs by less than two largest images."""
    draw = random.Random(seed)
    table = Table()
    names = [f"k{number}" for number in range(keys)]
    number = 0
    work: Counter[str] = Counter()
    largest = 5
    for _ in range(300):
        for name in names:
            while len(table.scheduler.waiting_of(name)) < draw.randint(1, 6):
                steps, number = draw.randint(1, largest), number + 1
                table.submit(name, f"{number}x{steps}", steps=steps, priority=draw.randint(-10, 10))
        before = len(table.served)
        table.serve()
        for row_id in table.served[before:]:
            name, _, rest = row_id.partition("-")
            work[name] += int(rest.partition("x")[2].partition("/")[0])
        shares = [work[name] for name in names]
        assert max(shares) - min(shares) <= 2 * largest
