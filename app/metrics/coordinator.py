"""What one coordinator counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry

from app.engine.messages import DenoiseReport, StepPlan
from app.metrics.catalogue import BRANCHES, DECISIONS
from app.metrics.instruments import Instruments, exemplar


class Totals(Protocol):
    """What a coordinator adds up by itself, since its group was built; each only grows."""

    admitted: int
    finished: int
    refused: int
    cancelled: int
    deadline_impossible: int
    deadline_passed: int
    lowered_by_deadline: int
    lowered_by_load: int
    computed_seconds: float
    reused_seconds: float
    saved_seconds: float


class CoordinatorMetrics:
    """What one coordinator counts, labelled with its model and replica."""

    def __init__(self, registry: CollectorRegistry, model: str, replica: str) -> None:
        made = self._made = Instruments(registry, "coordinator", {"model": model, "replica": replica})
        # Those that every step writes are looked up once.
        self._steps = {
            (decision == "computed", branch): made.counter("flux_steps", decision, branch)
            for decision in DECISIONS
            for branch in BRANCHES
        }
        self._step_seconds = {kind: made.histogram("flux_step_duration_seconds", kind) for kind in DECISIONS}
        self._gaps = {kind: made.histogram("flux_straggler_gap_seconds", kind) for kind in DECISIONS}
        self._batch_rows = made.histogram("flux_step_batch_rows")
        self._batch_tokens = made.histogram("flux_step_batch_tokens")
        self._plan_wait = made.histogram("flux_plan_wait_seconds")
        self._checked = made.counter("flux_digests_checked")
        self._exported: dict[tuple[str, ...], float] = {}
        self.group_up(True)

    def observe_step(
        self, plan: StepPlan, rank_seconds: Sequence[float], *, wait_seconds: float = 0.0, tokens: int = 0
    ) -> None:
        """Count one finished plan; a plan that steps no row is not a step.

        Args:
            rank_seconds: time of each rank, by number.
            wait_seconds: the longest time that a rank which held rows waited for this plan.
            tokens: those that went through the block stack.
        """
        self._checked.inc(len(rank_seconds))
        if not plan.rows:
            return
        computed = 0
        for row in plan.rows:
            for branch in row.branches:
                self._steps[branch.compute, branch.branch].inc()
                computed += branch.compute
        kind = "computed" if computed else "reused"
        if computed:
            self._batch_rows.observe(computed)
            self._batch_tokens.observe(tokens)
        self._plan_wait.observe(wait_seconds)
        self._step_seconds[kind].observe(max(rank_seconds))
        self._gaps[kind].observe(max(rank_seconds) - min(rank_seconds))
        for rank, seconds in enumerate(rank_seconds):
            self._made.histogram("flux_rank_step_duration_seconds", str(rank), kind).observe(seconds)

    def observe_request(self, report: DenoiseReport, request_id: str | None = None) -> None:
        """Count one finished picture."""
        steps = report.computed + report.skipped
        self._made.histogram("flux_request_skip_ratio").observe(report.skipped / max(steps, 1), exemplar(request_id))
        self._made.histogram("flux_request_predicted_error").observe(report.predicted_error, exemplar(request_id))
        for step, decision in enumerate(report.schedule):
            decile = str(step * 10 // len(report.schedule))
            self._made.counter("flux_schedule_steps", decile, "computed" if decision == "C" else "reused").inc()

    def totals(self, totals: Totals) -> None:
        """Bring the counters of what the coordinator adds up by itself to its present sums."""
        for name, labels, value in (
            ("flux_pictures_admitted", (), totals.admitted),
            ("flux_pictures_finished", (), totals.finished),
            ("flux_pictures_refused", ("queue_full",), totals.refused),
            ("flux_pictures_refused", ("deadline_impossible",), totals.deadline_impossible),
            ("flux_pictures_cancelled", (), totals.cancelled),
            ("flux_deadline_misses", (), totals.deadline_passed),
            ("flux_downgrades", ("deadline",), totals.lowered_by_deadline),
            ("flux_downgrades", ("load",), totals.lowered_by_load),
            ("flux_decision_seconds", ("computed",), totals.computed_seconds),
            ("flux_decision_seconds", ("reused",), totals.reused_seconds),
            ("flux_saved_seconds", (), totals.saved_seconds),
        ):
            before = self._exported.get((name, *labels), 0.0)
            self._made.counter(name, *labels).inc(value - before)
            self._exported[name, *labels] = value

    def running(self, pictures: int) -> None:
        """Set how many pictures are in the batch."""
        self._made.gauge("flux_running_pictures").set(pictures)

    def waiting(self, pictures: int) -> None:
        """Set how many pictures wait for room in the batch."""
        self._made.gauge("flux_waiting_pictures").set(pictures)

    def waiting_limit(self, pictures: int) -> None:
        """Set how many waiting pictures fill the queue."""
        self._made.gauge("flux_waiting_pictures_limit").set(pictures)

    def residual_bytes(self, count: int) -> None:
        """Set the residuals' memory on the rank that keeps most."""
        self._made.gauge("flux_residual_bytes").set(count)

    def group_up(self, up: bool) -> None:
        """Set whether the group works."""
        self._made.gauge("flux_group_up").set(up)

    def group_rebuilt(self, times: int = 1) -> None:
        """Count rebuilds; a fresh coordinator is told of those before it."""
        self._made.counter("flux_group_rebuilds").inc(times)

    def digest_mismatch(self, times: int = 1) -> None:
        """Count ranks that disagreed with the coordinator's history; a fresh coordinator is told of those before it."""
        self._made.counter("flux_digest_mismatches").inc(times)
