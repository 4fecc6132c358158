"""A group whose steps take a known time on a simulated clock: real table, real plans, no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.control.admission import AdmissionController, default_job
from app.control.request import RequestState, RowShape
from app.control.schedule import SchedulePlanner
from app.control.step_costs import PlanPart
from app.engine.sampling import FlowMatchSampler
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.results import DenoiseReport, StepResult, StepTime
from app.settings import MagCacheSettings, Settings
from tests.local_group import MODEL, job

SAMPLER = FlowMatchSampler(MODEL)
TINY = Settings(magcache=MagCacheSettings(profile="flux-tiny"))
DEFAULT = MagCacheOptions()
FLOOR = 7
"""A quarter of 28 steps."""


def step_seconds(part: PlanPart) -> float:
    """What a part really takes: a fixed cost and one per token, less of both when it reuses."""
    return (0.010 + 1e-4 * part.size) * (1.0 if part.compute else 0.05)


@dataclass
class Finished:
    """An image that took its last step."""

    report: DenoiseReport
    seconds: float


class SimulatedRanks:
    """Takes jobs and runs plans one at a time."""

    def __init__(self, settings: Settings = TINY, seconds: Callable[[PlanPart], float] = step_seconds) -> None:
        self.now_s = 0.0
        shape = RowShape.of(default_job(settings), settings)
        parts = [PlanPart(shape, compute, rows) for rows in (1, 2) for compute in (True, False)]
        measured_times = [StepTime(part.rows, part.compute, seconds(part)) for part in parts]
        self.admission = AdmissionController(
            settings, SchedulePlanner(settings, SAMPLER), measured_times, lambda: self.now_s
        )
        self.finished: dict[str, Finished] = {}
        self.too_late: list[str] = []
        self._seconds = seconds
        self._entries: dict[str, RequestState] = {}

    def submit(self, job: DenoiseJob) -> RequestState:
        """Submit a job; see `AdmissionController.take` for errors."""
        entry = self.admission.submit(job)
        self._entries[job.row_id] = entry
        return entry

    def tick(self) -> bool:
        """Run the plans of one message; False when there are none."""
        message = self.admission.next_message(lambda row_id: self._entries[row_id].shape)
        self.too_late += [entry.job.row_id for entry in self.admission.scheduler.take_too_late()]
        for sent in message:
            plan = sent.plan
            seconds = sum(map(self._seconds, sent.parts))
            self.now_s += seconds
            self.admission.on_results(sent, [StepResult(0, plan.sequence, plan.digest, seconds, 0, {})])
            for row in plan.rows:
                if row.last:
                    entry = self._entries[row.row_id]
                    self.finished[row.row_id] = Finished(entry.report(self.now_s), self.now_s - entry.submitted_s)
        return bool(message)

    def run(self, until_s: float = float("inf")) -> None:
        """Run plans until the clock reaches ``until_s`` or nothing is left."""
        while self.now_s < until_s and self.tick():
            pass


def image(name: str, **options) -> DenoiseJob:
    return job(f"{name}/0", **{"magcache": DEFAULT, **options})


def calibrated(settings: Settings = TINY) -> SimulatedRanks:
    """Ranks that have made an image of each kind."""
    ranks = SimulatedRanks(settings)
    for index, options in enumerate([{}, {"true_cfg_scale": 2.0}, {"size": (160, 96)}, {"size": (256, 256)}]):
        ranks.submit(image(f"first{index}", **options))
        ranks.run()
    return ranks
