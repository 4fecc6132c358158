"""The metric catalogue: what the API and the coordinators count, and how several sources become one exposition.

Each owner has a registry of its own; nothing is registered globally, so that a test or a process may hold several.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from app.engine.messages import COND, UNCOND, DenoiseReport, StepPlan

PHASES = ("queue", "encode", "denoise", "decode", "total")
OUTCOMES = ("ok", "invalid", "busy", "unavailable", "failed", "cancelled")

# From the small model's tenths of a second on a CPU to a queue of FLUX.1-dev pictures.
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0)
_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_GAP_BUCKETS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_RATIO_BUCKETS = tuple(tenth / 10 for tenth in range(11))
_ROW_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class ApiMetrics:
    """What the HTTP side counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "flux_requests",
            "Image requests by outcome and class of the HTTP status.",
            ("outcome", "status_class"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "flux_request_duration_seconds",
            "Time from an image request's arrival to its reply, by outcome.",
            ("outcome",),
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._phase_seconds = Histogram(
            "flux_phase_duration_seconds",
            "Time of one picture in each phase: queue, encode, denoise, decode and total.",
            ("phase",),
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        # A series that exists from the start at 0 lets a rate see the first event.
        for outcome, status_class in zip(OUTCOMES, ("2xx", "4xx", "4xx", "5xx", "5xx", "4xx"), strict=True):
            self._requests.labels(outcome, status_class)
            self._request_seconds.labels(outcome)
        for phase in PHASES:
            self._phase_seconds.labels(phase)

    def observe_request(self, outcome: str, status: int, seconds: float) -> None:
        """Count one image request that ended with the HTTP status ``status``."""
        self._requests.labels(outcome, f"{status // 100}xx").inc()
        self._request_seconds.labels(outcome).observe(seconds)

    def observe_phases(
        self, *, queue_s: float, encode_s: float, denoise_s: float, decode_s: float, total_s: float
    ) -> None:
        """Record one picture's time in each phase."""
        for phase, seconds in zip(PHASES, (queue_s, encode_s, denoise_s, decode_s, total_s), strict=True):
            self._phase_seconds.labels(phase).observe(seconds)


class CoordinatorMetrics:
    """What one coordinator counts, labelled with its model and replica."""

    def __init__(self, registry: CollectorRegistry, model: str, replica: str) -> None:
        names, values = ("model", "replica"), (model, replica)
        self._steps = Counter(
            "flux_steps",
            "Denoising steps by decision (computed, reused) and CFG branch.",
            (*names, "decision", "branch"),
            registry=registry,
        )
        self._series = {
            (compute, branch): self._steps.labels(*values, "computed" if compute else "reused", branch)
            for compute in (True, False)
            for branch in (COND, UNCOND)
        }
        self._skip_ratio = Histogram(
            "flux_request_skip_ratio",
            "Share of a picture's steps that reused a residual, 0 to 1.",
            names,
            buckets=_RATIO_BUCKETS,
            registry=registry,
        ).labels(*values)
        self._batch_rows = Histogram(
            "flux_step_batch_rows",
            "Rows that computed the block stack in one step plan, both CFG branches counted; 0 when all rows reused.",
            names,
            buckets=_ROW_BUCKETS,
            registry=registry,
        ).labels(*values)
        self._step_seconds = Histogram(
            "flux_step_duration_seconds",
            "Time of one step plan on the slowest rank; kind is computed when any row computed, else reused.",
            (*names, "kind"),
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._step_kinds = {kind: self._step_seconds.labels(*values, kind) for kind in ("computed", "reused")}
        self._plan_wait = Histogram(
            "flux_plan_wait_seconds",
            "Time that a rank with rows to step waited for a step plan, the longest of the ranks.",
            names,
            buckets=_GAP_BUCKETS,
            registry=registry,
        ).labels(*values)
        self._running = Gauge("flux_running_pictures", "Pictures being denoised now.", names, registry=registry).labels(
            *values
        )
        self._waiting = Gauge(
            "flux_waiting_pictures", "Pictures waiting for room in the batch.", names, registry=registry
        ).labels(*values)
        self._rebuilds = Counter(
            "flux_group_rebuilds",
            "Times that the tensor-parallel group was built again after a failure.",
            names,
            registry=registry,
        ).labels(*values)
        self._mismatches = Counter(
            "flux_digest_mismatches",
            "Plans whose history digest a rank did not agree with; each rebuilds the group.",
            names,
            registry=registry,
        ).labels(*values)
        self._residual_bytes = Gauge(
            "flux_residual_bytes", "Memory that kept residuals take on one rank, the largest.", names, registry=registry
        ).labels(*values)

    def observe_step(self, plan: StepPlan, seconds: float, wait_seconds: float = 0.0) -> None:
        """Count one finished plan; a plan that steps no row is not a step.

        Args:
            seconds: time of the slowest rank.
            wait_seconds: the longest time that a rank which held rows waited for this plan.
        """
        if not plan.rows:
            return
        computed = 0
        for row in plan.rows:
            for branch in row.branches:
                self._series[branch.compute, branch.branch].inc()
                computed += branch.compute
        self._batch_rows.observe(computed)
        self._plan_wait.observe(wait_seconds)
        self._step_kinds["computed" if computed else "reused"].observe(seconds)

    def observe_request(self, report: DenoiseReport) -> None:
        """Count one finished picture."""
        self._skip_ratio.observe(report.skipped / max(report.computed + report.skipped, 1))

    def running(self, pictures: int) -> None:
        """Set how many pictures are in the batch."""
        self._running.set(pictures)

    def waiting(self, pictures: int) -> None:
        """Set how many pictures wait for room in the batch."""
        self._waiting.set(pictures)

    def residual_bytes(self, count: int) -> None:
        """Set the residuals' memory on the rank that keeps most."""
        self._residual_bytes.set(count)

    def group_rebuilt(self, times: int = 1) -> None:
        """Count rebuilds; a fresh coordinator is told of those before it."""
        self._rebuilds.inc(times)

    def digest_mismatch(self) -> None:
        """Count a rank that disagreed with the coordinator's history."""
        self._mismatches.inc()


def merge_families(*sources: Iterable[Metric]) -> list[Metric]:
    """One family per name with the samples of all sources, sorted by name, so that the exposition is valid.

    Raises:
        ValueError: two sources give one name different types, or one series twice.
    """
    merged: dict[str, Metric] = {}
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for family in (family for source in sources for family in source):
        target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
        if target.type != family.type:
            raise ValueError(f"metric {family.name} is a {target.type} in one source and a {family.type} in another")
        for sample in family.samples:
            series = sample.name, tuple(sorted(sample.labels.items()))
            if series in seen:
                raise ValueError(f"metric series {sample.name}{sample.labels} comes from two sources")
            seen.add(series)
            target.samples.append(sample)
    return [merged[name] for name in sorted(merged)]


class Families:
    """Metric families in the shape of a registry, as prometheus_client's exposition functions take them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families
