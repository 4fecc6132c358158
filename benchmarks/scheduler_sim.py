"""How long the scheduler takes, by images under way and waiting: ``python -m benchmarks.scheduler_sim``.

The coordinator's own table (`app/control/scheduler.py`) on simulated requests: unlike sizes, step counts, thresholds,
CFG and priorities, a budget that some of them have to wait for, and an arrival for every image that leaves. One
tick forms one plan, digest included. Pure Python, one process, no ranks; times are the thread's CPU time, so that other
work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from app.control.forecast import Forecast
from app.control.request import RequestState
from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.control.step_costs import PlanPart, StepCosts, parts_of
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.settings import MagCacheSettings, Settings

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
ACTIVE = (1, 3, 10, 30, 100, 300, 1000)
QUEUED = (0, 1_000, 10_000, 100_000)
SIZES = ((128, 128), (160, 96), (64, 64))
OPTIONS = (MagCacheOptions(), MagCacheOptions(mag_threshold=0.3), MagCacheOptions(enabled=False))
TOKENS_PER_ROW = 110
"""Budget of a step for each row under way; rows have 98 tokens on average."""


class Traffic:
    """A table that is kept at ``active`` images under way and ``queued`` waiting."""

    def __init__(self, planner: SchedulePlanner, active: int, queued: int) -> None:
        self._draw = random.Random(0)
        self._planner = planner
        self._arrivals = 0
        self._population = active + queued
        settings = Settings(
            max_batch_rows=active,
            max_batch_tokens=max(active * TOKENS_PER_ROW, Settings().max_batch_tokens),
            max_ongoing_requests=active + Settings().max_waiting_pictures,
        )
        self.scheduler = StepScheduler(settings, lambda: 0.01 * self._arrivals)
        self.entries: dict[str, RequestState] = {}
        self.refill()

    def refill(self) -> None:
        """As many images again as there should be."""
        while self.scheduler.running + self.scheduler.waiting < self._population:
            self.submit(self.job())

    def job(self) -> DenoiseJob:
        """Another request."""
        draw = self._draw
        width, height = draw.choice(SIZES)
        self._arrivals += 1
        return DenoiseJob(
            row_id=f"{self._arrivals}/0",
            width=width,
            height=height,
            num_inference_steps=draw.randint(12, 40),
            guidance_scale=3.5,
            true_cfg_scale=draw.choice((1.0, 1.0, 1.0, 2.0)),
            seed=0,
            magcache=draw.choice(OPTIONS),
            priority=draw.choice((0, 0, 0, 1)),
        )

    def submit(self, job: DenoiseJob) -> None:
        """Queue it."""
        self.entries[job.row_id] = self.scheduler.submit(job, self._planner.schedules(job))

    def tick(self) -> StepPlan:
        """Form one plan."""
        plan = self.scheduler.next_plan()
        assert plan is not None
        return plan


def measure(planner: SchedulePlanner, active: int, queued: int, ticks: int) -> dict[str, Any]:
    """Microseconds of each operation with so many images."""
    traffic = Traffic(planner, active, queued)
    scheduler = traffic.scheduler
    for _ in range(60):  # until images end and begin all the time
        plan = traffic.tick()
        traffic.refill()
    tick_us, stepping = [], []
    for _ in range(ticks):
        microseconds, plan = timed(traffic.tick)
        tick_us.append(microseconds)
        stepping.append(len(plan.rows))
        traffic.refill()

    shape = next(iter(traffic.entries.values())).shape
    costs = StepCosts({PlanPart(shape, True, 1): 0.03, PlanPart(shape, False, 1): 0.001})
    costs.observe(parts_of(plan, lambda row_id: traffic.entries[row_id].shape), 0.1)
    newest = list(traffic.entries.values())[-20:]
    estimate_us = [timed(partial(estimate, scheduler, costs, entry))[0] for entry in newest]
    submit_us = [timed(partial(traffic.submit, traffic.job()))[0] for _ in range(200)]
    waiting = [entry.job.row_id for entry in scheduler.waiting_entries]
    leaving = random.Random(1).sample(waiting, min(len(waiting), 200))
    cancel_us = [timed(partial(scheduler.cancel, row_id))[0] for row_id in leaving]
    return {
        "active": active,
        "queued": queued,
        "rows_per_plan": float(np.mean(stepping)),
        "tick_us": summary(tick_us),
        "submit_us": summary(submit_us),
        "cancel_us": summary(cancel_us),
        "estimate_us": summary(estimate_us),
    }


def estimate(scheduler: StepScheduler, costs: StepCosts, entry: RequestState) -> float:
    """What a newcomer is told: seconds to its last step."""
    return Forecast(scheduler, costs, 0.0, entry).total_s()


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Microseconds of CPU time that ``call`` takes, and what it returns."""
    started = time.thread_time_ns()
    result = call()
    return (time.thread_time_ns() - started) / 1e3, result


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(max(values), 1)}


def growth(cells: Sequence[dict[str, Any]], over: str) -> float:
    """The exponent of the median tick's growth over ``active`` or ``queued``: 0 is flat, 1 is linear."""
    points = [(cell[over], cell["tick_us"]["p50"]) for cell in cells if cell[over] >= 10]
    return float(np.polyfit(*np.log(points).T, 1)[0])


def plot(document: dict[str, Any], path: Path) -> None:
    """The median and the 99th percentile of a tick, over images under way and over images that wait."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, over, name in zip(axes, ("active", "queued"), ("under way", "waiting"), strict=True):
        cells = document[f"by_{over}"]
        at = [max(cell[over], 1) for cell in cells]
        for figure_of, style in (("p50", "o-"), ("p99", "s--")):
            axis.plot(at, [cell["tick_us"][figure_of] / 1000 for cell in cells], style, label=figure_of)
        fixed = {"active": "queued", "queued": "active"}[over]
        fixed_name = {"queued": "waiting", "active": "under way"}[fixed]
        axis.set_title(f"{cells[0][fixed]:,} {fixed_name}; growth exponent {document['growth'][over]:.2f}")
        axis.set_xlabel(f"images {name}" + (" (0 drawn at 1)" if over == "queued" else ""))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0].set_ylabel("one tick, ms of CPU time")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler_sim", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scheduler_sim.json")
    parser.add_argument("--ticks", type=int, default=200, help="measured ticks of each cell")
    parser.add_argument("--scale", type=int, default=1, help="divide both axes by this, for a quick look")
    args = parser.parse_args(argv)
    settings = Settings(magcache=MagCacheSettings(profile="flux-tiny"))
    planner = SchedulePlanner(settings, FlowMatchSampler(ROOT / "models/flux-tiny"))
    active = [count // args.scale for count in ACTIVE if count >= args.scale]
    queued = [count // args.scale for count in QUEUED]
    by_active = [measure(planner, count, queued[-1], args.ticks) for count in active]
    by_queued = [measure(planner, active[-1], count, args.ticks) for count in queued[:-1]] + by_active[-1:]
    document = {
        "setup": {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "python": platform.python_version(),
            "ticks": args.ticks,
        },
        "growth": {"active": growth(by_active, "active"), "queued": growth(by_queued, "queued")},
        "by_active": by_active,
        "by_queued": by_queued,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(document, args.out.with_suffix(".png"))
    for cell in [*by_active, *by_queued[:-1]]:
        names = ("tick", "submit", "cancel", "estimate")
        figures = ", ".join(f"{name} {cell[f'{name}_us']['p50']:.0f}" for name in names)
        print(f"{cell['active']:>5} under way, {cell['queued']:>7} waiting: median microseconds {figures}")
    print(f"growth exponents of a tick: {document['growth']}")


if __name__ == "__main__":
    main()
