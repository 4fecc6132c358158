"""The scheduler's invariants, on random traffic against a simulated clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.request import RequestState
from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.settings import HttpSettings, MagCacheSettings, Settings
from magcache_core import choose, load_profile
from tests.local_group import MODEL, job

PROFILE = load_profile("flux-tiny")
PLANNER = SchedulePlanner(Settings(magcache=MagCacheSettings(profile="flux-tiny")), FlowMatchSampler(MODEL))
SIZES = ((128, 128), (160, 96), (64, 64), (256, 256))
OPTIONS = (MagCacheOptions(), MagCacheOptions(enabled=False), MagCacheOptions(mag_threshold=0.3), MagCacheOptions())


@dataclass
class Simulation:
    """Random traffic, a clock that moves with what is computed, and what must hold after each plan."""

    settings: Settings
    seed: int
    now_s: float = 0.0
    entries: dict[str, RequestState] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    admitted: list[str] = field(default_factory=list)

    def run(self, requests: int, rate: float, cancelled: float = 0.05) -> None:
        """``rate`` is arrivals a second, ``cancelled`` the share that somebody cancels at some time."""
        draw = random.Random(self.seed)
        scheduler = StepScheduler(self.settings, lambda: self.now_s)
        arrivals = []
        at_s = 0.0
        for number in range(requests):
            at_s += draw.expovariate(rate)
            arrivals.append((at_s, self._job(draw, number)))
        leaving = sorted((at + draw.uniform(0, 20), one.row_id) for at, one in arrivals if draw.random() < cancelled)
        arrivals.reverse()
        leaving.reverse()
        while arrivals or not scheduler.empty:
            while arrivals and arrivals[-1][0] <= self.now_s:
                one = arrivals.pop()[1]
                self.entries[one.row_id] = scheduler.submit(one, PLANNER.schedules(one))
            while leaving and leaving[-1][0] <= self.now_s:
                row_id = leaving.pop()[1]
                if row_id in self.entries and scheduler.cancel(row_id):
                    self._end(row_id, "cancelled")
            plan = scheduler.next_plan()
            for entry in scheduler.take_too_late():
                assert entry.deadline_s is not None
                assert entry.deadline_s <= self.now_s
                self._end(entry.job.row_id, "too late")
            if plan is None:
                self.now_s = max(self.now_s, arrivals[-1][0]) if arrivals else self.now_s
                continue
            self._check(plan, scheduler)
            self.now_s += 0.005 + 0.01 * sum(part.compute for row in plan.rows for part in row.branches)

    def _job(self, draw: random.Random, number: int) -> DenoiseJob:
        return job(
            f"{number}/0",
            size=draw.choice(SIZES),
            steps=draw.randint(1, 14),
            magcache=draw.choice(OPTIONS),
            true_cfg_scale=draw.choice((1.0, 1.0, 2.0)),
            priority=draw.choice((0, 0, 0, 0, 1, 2)),
            deadline_s=draw.choice((None, None, None, draw.uniform(0.1, 60))),
            key_name=draw.choice(("alice", "alice", "bob", "carol")),
        )

    def _end(self, row_id: str, how: str) -> None:
        assert row_id not in self.ended
        self.ended[row_id] = how
        self.left_out.discard(row_id)

    def _check(self, plan: StepPlan, scheduler: StepScheduler) -> None:
        under_way = {row_id for row_id in self.admitted if row_id not in self.ended}
        joining = [one.row_id for one in plan.admit]
        stepping = [row.row_id for row in plan.rows]
        assert len(set(stepping)) == len(stepping) <= self.settings.max_batch_rows
        assert set(plan.drop) == {row_id for row_id in plan.drop if self.ended[row_id] != "done"}
        assert under_way | set(joining) >= set(stepping) >= set(joining)
        assert len(under_way) + len(joining) <= self.settings.max_batch_rows

        tokens = 0
        for row in plan.rows:
            entry = self.entries[row.row_id]
            assert row.step == self.steps.get(row.row_id, 0)
            assert row.last == (row.step + 1 == entry.job.num_inference_steps)
            for part in row.branches:
                decision = entry.schedules[part.branch].decisions[row.step]
                assert (part.compute, part.weights) == (decision.compute, decision.weights)
                tokens += part.compute * entry.shape.tokens
        assert tokens <= self.settings.max_batch_tokens

        left_out = under_way - set(stepping)
        assert all(self.entries[row_id].cost > 0 for row_id in left_out), "a row that reuses always steps"
        reusing = [row for row in plan.rows if not any(part.compute for part in row.branches)]
        assert reusing in ([], list(plan.rows)), "what reuses goes ahead alone"
        if tokens:
            assert not left_out & self.left_out, "left out twice in a row"
            self.left_out = left_out
        assert tokens or not joining
        if joining:
            last_due = max(self.entries[row_id].key for row_id in joining)
            waiting = next(iter(scheduler.waiting_entries), None)
            assert waiting is None or waiting.key > last_due, "overtaken by an image that is due later"
            assert all(self.entries[row_id].key > last_due for row_id in left_out), "joined before a row left out"

        self.admitted = [*(row_id for row_id in self.admitted if row_id not in self.ended), *joining]
        for row in plan.rows:
            self.steps[row.row_id] = row.step + 1
            if row.last:
                self._end(row.row_id, "done")


def test_ten_thousand_requests() -> None:
    simulation = Simulation(Settings(max_batch_rows=12, max_batch_tokens=1152), seed=3)
    simulation.run(10_000, rate=20.0)
    how = list(simulation.ended.values())
    assert len(how) == 10_000
    # The traffic is such that each thing happens often, or the checks would check nothing.
    assert min(how.count(each) for each in ("done", "cancelled", "too late")) >= 100
    waited = [entry for entry in simulation.entries.values() if (entry.admitted_s or 0.0) > entry.submitted_s + 1]
    assert len(waited) >= 100
    assert {entry.job.priority for entry in waited} >= {0, 1}


@settings(max_examples=40)
@given(
    rows=st.integers(1, 12),
    tokens=st.sampled_from([576, 600, 700, 1152, 5000]),
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([2.0, 20.0, 500.0]),
)
def test_any_limits(rows: int, tokens: int, seed: int, rate: float) -> None:
    simulation = Simulation(Settings(max_batch_rows=rows, max_batch_tokens=tokens), seed)
    simulation.run(60, rate, cancelled=0.2)
    assert len(simulation.ended) == 60


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rate=st.sampled_from([2.0, 20.0, 500.0]))
def test_with_api_keys(seed: int, rate: float) -> None:
    limits = Settings(max_batch_rows=5, max_batch_tokens=700, http=HttpSettings(api_keys_file="keys"))
    simulation = Simulation(limits, seed)
    simulation.run(60, rate, cancelled=0.2)
    assert len(simulation.ended) == 60


def test_nobody_starves_under_endless_urgent_traffic() -> None:
    """One image of low priority, and always more urgent ones than fit: it waits for its due time and no longer."""
    now_s = 0.0
    limits = Settings(max_batch_rows=1, patience_s=5.0)
    scheduler = StepScheduler(limits, lambda: now_s)
    patient = scheduler.submit(job("patient/0", steps=1), PLANNER.schedules(job("patient/0", steps=1)))
    for number in range(1000):
        urgent = job(f"{number}/0", steps=1, priority=3)
        scheduler.submit(urgent, PLANNER.schedules(urgent))
        scheduler.next_plan()
        now_s += 0.1
    assert patient.admitted_s is not None
    assert 3 * limits.patience_s <= patient.admitted_s <= 3 * limits.patience_s + 0.2


def test_schedules_are_the_librarys() -> None:
    for steps in (1, 4, 9, 14, 28, 50):
        expected = choose(PROFILE, steps).schedule
        guided = choose(PROFILE, steps, true_cfg_scale=2.0).schedule
        for size in SIZES:
            asked = job("a/0", steps=steps, size=size, magcache=OPTIONS[0])
            assert PLANNER.schedules(asked)["cond"].text == expected
            both = PLANNER.schedules(replace(asked, true_cfg_scale=2.0))
            assert [schedule.text for schedule in both.values()] == [guided, guided]
