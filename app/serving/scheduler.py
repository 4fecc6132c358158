"""The request table and the plans formed from it. Pure: no Ray, no tensors; the clock is given.

Each tick: drop what was cancelled, admit what has room, advance every running row by one step with the decisions that
were fixed at its admission. Rows at different steps, sizes and settings share a plan.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from app.engine.messages import (
    COND,
    FIRST_DIGEST,
    UNCOND,
    BranchStep,
    DenoiseJob,
    DenoiseReport,
    RowStep,
    StepPlan,
    plan_digest,
)
from app.serving.trajectory import Trajectory


@dataclass
class Entry:
    """One picture from its submission to its last step."""

    job: DenoiseJob
    trajectories: Mapping[str, Trajectory]
    submitted_s: float
    admitted_s: float = 0.0
    step: int = 0
    batch_rows: int = 0

    def next_step(self) -> RowStep:
        """The row's part of the next plan."""
        branches = tuple(
            BranchStep(name, decision.compute, decision.weights, trajectory.history)
            for name, trajectory in self.trajectories.items()
            for decision in [trajectory.decisions[self.step]]
        )
        return RowStep(self.job.row_id, self.step, branches, last=self.step + 1 == self.job.num_inference_steps)

    def report(self, finished_s: float) -> DenoiseReport:
        """How the picture was denoised."""
        cond, uncond = self.trajectories[COND], self.trajectories.get(UNCOND)
        return DenoiseReport(
            schedule=cond.schedule,
            computed=cond.schedule.count("C"),
            skipped=cond.schedule.count("."),
            predicted_error=cond.predicted_error,
            negative_schedule=uncond.schedule if uncond else None,
            queue_seconds=self.admitted_s - self.submitted_s,
            denoise_seconds=finished_s - self.admitted_s,
            batch_rows_mean=self.batch_rows / len(cond.decisions),
        )


class StepScheduler:
    """First come, first served, up to ``max_batch_rows`` pictures at once."""

    def __init__(self, max_batch_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_batch_rows = max_batch_rows
        self._clock = clock
        self._waiting: deque[Entry] = deque()
        self._running: dict[str, Entry] = {}
        self._dropped: list[str] = []
        self._sequence = 0
        self._digest = FIRST_DIGEST

    @property
    def waiting(self) -> int:
        """Pictures that are not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Pictures under way."""
        return len(self._running)

    def submit(self, job: DenoiseJob, trajectories: Mapping[str, Trajectory]) -> Entry:
        """Queue a picture; its ``row_id`` must not be known already."""
        entry = Entry(job, trajectories, submitted_s=self._clock())
        self._waiting.append(entry)
        return entry

    def cancel(self, row_id: str) -> bool:
        """End a picture at the next step boundary; False when it already took its last step or is unknown."""
        if self._running.pop(row_id, None) is not None:
            self._dropped.append(row_id)
            return True
        kept = deque(entry for entry in self._waiting if entry.job.row_id != row_id)
        found = len(kept) < len(self._waiting)
        self._waiting = kept
        return found

    def next_plan(self) -> StepPlan | None:
        """The next plan for all ranks, or None when there is nothing to do."""
        admitted = self._admit()
        if not self._running and not self._dropped:
            return None
        plan = StepPlan(
            sequence=self._sequence,
            digest="",
            admit=tuple(entry.job for entry in admitted),
            rows=tuple(entry.next_step() for entry in self._running.values()),
            drop=tuple(self._dropped),
        )
        self._digest = plan_digest(self._digest, plan)
        self._sequence += 1
        self._dropped.clear()
        self._advance(len(plan.rows))
        return replace(plan, digest=self._digest)

    def _admit(self) -> list[Entry]:
        admitted = []
        while self._waiting and len(self._running) < self._max_batch_rows:
            entry = self._waiting.popleft()
            entry.admitted_s = self._clock()
            self._running[entry.job.row_id] = entry
            admitted.append(entry)
        return admitted

    def _advance(self, batch_rows: int) -> None:
        for row_id, entry in list(self._running.items()):
            entry.step += 1
            entry.batch_rows += batch_rows
            if entry.step == entry.job.num_inference_steps:
                del self._running[row_id]
