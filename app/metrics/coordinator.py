"""The metrics of one coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily

from app.control.counters import CoordinatorCounters
from app.messages.plans import StepPlan
from app.messages.results import DenoiseReport
from app.metrics.catalogue import BRANCHES, BY_NAME, DECISIONS
from app.metrics.instruments import Instruments, exemplar


class _CountersCollector:
    """Exports the coordinator's counters at each scrape; prometheus_client's way for totals kept elsewhere."""

    def __init__(self, counters: CoordinatorCounters, labels: Mapping[str, str]) -> None:
        self._counters = counters
        self._labels = labels

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family per metric."""
        for name, series in _series(self._counters).items():
            family = CounterMetricFamily(name, BY_NAME[name].help, labels=[*self._labels, *BY_NAME[name].labels])
            for values, total in series.items():
                family.add_metric([*self._labels.values(), *values], total)
            yield family


def _series(sums: CoordinatorCounters) -> dict[str, dict[tuple[str, ...], float]]:
    """Totals by metric and by the values of its own labels."""
    return {
        "flux_pictures_admitted": {(): sums.admitted},
        "flux_pictures_finished": {(): sums.finished},
        "flux_pictures_refused": {
            ("queue_full",): sums.refused,
            ("deadline_impossible",): sums.deadline_impossible,
        },
        "flux_pictures_cancelled": {(): sums.cancelled},
        "flux_deadline_misses": {(): sums.deadline_passed},
        "flux_downgrades": {("deadline",): sums.lowered_by_deadline, ("load",): sums.lowered_by_load},
        "flux_decision_seconds": {("computed",): sums.computed_seconds, ("reused",): sums.reused_seconds},
        "flux_saved_seconds": {(): sums.saved_seconds},
        "flux_calibration_runs": {(): sums.calibration_runs},
        "flux_calibration_seconds": {(): sums.calibration_seconds},
    }


class CoordinatorMetrics:
    """Writes one coordinator's metrics, labelled with its model and replica."""

    def __init__(self, registry: CollectorRegistry, model: str, replica: str, counters: CoordinatorCounters) -> None:
        """``counters`` are read at each scrape; the other metrics are written by the methods here."""
        labels = {"model": model, "replica": replica}
        registry.register(_CountersCollector(counters, labels))
        made = self._made = Instruments(registry, "coordinator", labels, read_elsewhere=_series(counters))
        # Instruments written at every step are looked up once.
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
        self.group_up(True)

    def observe_step(
        self, plan: StepPlan, rank_seconds: Sequence[float], *, wait_seconds: float = 0.0, tokens: int = 0
    ) -> None:
        """Count one finished plan; one that steps no row is not counted as a step.

        Args:
            rank_seconds: time of each rank, in order of rank.
            wait_seconds: the longest time that a rank which held rows waited for this plan.
            tokens: number that went through the block stack.
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
        """Count one finished image."""
        steps = report.computed + report.skipped
        self._made.histogram("flux_request_skip_ratio").observe(report.skipped / max(steps, 1), exemplar(request_id))
        self._made.histogram("flux_request_predicted_error").observe(report.predicted_error, exemplar(request_id))
        for step, decision in enumerate(report.schedule):
            decile = str(step * 10 // len(report.schedule))
            self._made.counter("flux_schedule_steps", decile, "computed" if decision == "C" else "reused").inc()

    def running(self, images: int) -> None:
        """Set how many images are in the batch."""
        self._made.gauge("flux_running_pictures").set(images)

    def waiting(self, images: int) -> None:
        """Set how many images wait for room in the batch."""
        self._made.gauge("flux_waiting_pictures").set(images)

    def waiting_limit(self, images: int) -> None:
        """Set how many waiting images fill the queue."""
        self._made.gauge("flux_waiting_pictures_limit").set(images)

    def residual_bytes(self, count: int) -> None:
        """Set the residuals' memory on the rank that keeps most."""
        self._made.gauge("flux_residual_bytes").set(count)

    def lora_bytes(self, count: int) -> None:
        """Set the memory set aside for adapters on each rank."""
        self._made.gauge("flux_lora_bytes").set(count)

    def lora_load(self, result: str) -> None:
        """Count one load of an adapter, ``loaded`` or ``failed``."""
        self._made.counter("flux_lora_loads", result).inc()

    def attention(self, backend: str) -> None:
        """Say which attention backend the ranks use."""
        self._made.gauge("flux_attention_info", backend).set(1)

    def group_up(self, up: bool) -> None:
        """Set whether the group works."""
        self._made.gauge("flux_group_up").set(up)

    def group_rebuilt(self, times: int = 1) -> None:
        """Count group rebuilds; a new coordinator starts with those before it."""
        self._made.counter("flux_group_rebuilds").inc(times)

    def digest_mismatch(self, times: int = 1) -> None:
        """Count ranks whose history differed from the coordinator's; a new coordinator starts with those before it."""
        self._made.counter("flux_digest_mismatches").inc(times)
