"""The catalogue counts what it says, its document is true, and several sources make one valid exposition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from app.control.counters import CoordinatorCounters
from app.messages import COND, UNCOND, BranchStep, DenoiseReport, RowStep, StepPlan
from app.metrics import CATALOGUE, ApiMetrics, CoordinatorMetrics, EncoderMetrics, Families, merge_families
from app.metrics.__main__ import document
from app.metrics.catalogue import BRANCHES, COMMON

LABELS = {"model": "m", "replica": "r"}
BOUNDED = {"model", "replica", "rank"}


def _metrics(
    replica: str = "r", counters: CoordinatorCounters | None = None
) -> tuple[CollectorRegistry, CoordinatorMetrics]:
    registry = CollectorRegistry()
    return registry, CoordinatorMetrics(registry, "m", replica, counters or CoordinatorCounters())


def _plan(*rows: tuple[bool, ...]) -> StepPlan:
    """One row per tuple: whether its conditional, and then its unconditional branch computes."""
    steps = tuple(
        RowStep(
            f"q/{index}",
            3,
            tuple(BranchStep(branch, compute) for branch, compute in zip((COND, UNCOND), row, strict=False)),
        )
        for index, row in enumerate(rows)
    )
    return StepPlan(1, "0" * 16, rows=steps)


def test_steps_by_decision_and_branch() -> None:
    registry, metrics = _metrics()
    metrics.observe_step(_plan((True,), (False,), (True, False)), [0.01, 0.02], wait_seconds=0.25, tokens=192)
    metrics.observe_step(_plan((False,)), [0.001, 0.001])
    metrics.observe_step(StepPlan(2, "0" * 16, drop=("q/0",)), [0.001, 0.001])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {**LABELS, **labels})

    assert BRANCHES == (COND, UNCOND)
    assert value("flux_steps_total", decision="computed", branch=COND) == 2
    assert value("flux_steps_total", decision="reused", branch=COND) == 2
    assert value("flux_steps_total", decision="computed", branch=UNCOND) == 0
    assert value("flux_steps_total", decision="reused", branch=UNCOND) == 1
    assert (value("flux_step_batch_rows_sum"), value("flux_step_batch_rows_count")) == (2, 1)
    assert (value("flux_step_batch_tokens_sum"), value("flux_step_batch_tokens_count")) == (192, 1)
    assert (value("flux_plan_wait_seconds_sum"), value("flux_plan_wait_seconds_count")) == (0.25, 2)
    for kind, seconds in (("computed", 0.02), ("reused", 0.001)):
        assert value("flux_step_duration_seconds_sum", kind=kind) == seconds
    assert value("flux_rank_step_duration_seconds_sum", kind="computed", rank="0") == 0.01
    assert value("flux_rank_step_duration_seconds_sum", kind="computed", rank="1") == 0.02
    assert value("flux_straggler_gap_seconds_sum", kind="computed") == pytest.approx(0.01)
    assert value("flux_straggler_gap_seconds_sum", kind="reused") == 0
    assert value("flux_digests_checked_total") == 6


def test_a_finished_image() -> None:
    registry, metrics = _metrics()
    metrics.observe_request(DenoiseReport("CC..C...", 3, 5, 0.4, None, 0.0, 0.1), "q")
    assert registry.get_sample_value("flux_request_skip_ratio_sum", LABELS) == 0.625
    assert registry.get_sample_value("flux_request_predicted_error_sum", LABELS) == 0.4

    def steps(decision: str) -> list[float | None]:
        return [
            registry.get_sample_value(
                "flux_schedule_steps_total", {**LABELS, "decile": str(decile), "decision": decision}
            )
            for decile in range(10)
        ]

    # Eight steps fall into eight of the ten parts.
    assert steps("computed") == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert steps("reused") == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]


def test_gauges_and_counts() -> None:
    registry, metrics = _metrics()
    metrics.running(3)
    metrics.waiting(2)
    metrics.waiting_limit(256)
    metrics.residual_bytes(4096)
    metrics.group_rebuilt()
    metrics.digest_mismatch()
    for name, value in (
        ("flux_running_pictures", 3), ("flux_waiting_pictures", 2), ("flux_waiting_pictures_limit", 256),
        ("flux_residual_bytes", 4096), ("flux_group_rebuilds_total", 1), ("flux_digest_mismatches_total", 1),
        ("flux_group_up", 1),
    ):  # fmt: skip
        assert registry.get_sample_value(name, LABELS) == value
    metrics.group_up(False)
    assert registry.get_sample_value("flux_group_up", LABELS) == 0


def test_a_coordinators_own_sums_become_counters() -> None:
    counts = CoordinatorCounters(
        admitted=1, finished=2, refused=3, cancelled=4, deadline_impossible=5, deadline_passed=6,
        lowered_by_deadline=7, lowered_by_load=8, computed_seconds=0.5, reused_seconds=0.25, saved_seconds=0.125,
    )  # fmt: skip
    registry, _ = _metrics(counters=counts)
    counts.admitted, counts.saved_seconds = 11, 0.5
    expected: list[tuple[str, dict[str, str], float]] = [
        ("flux_pictures_admitted_total", {}, 11),
        ("flux_pictures_finished_total", {}, 2),
        ("flux_pictures_refused_total", {"reason": "queue_full"}, 3),
        ("flux_pictures_cancelled_total", {}, 4),
        ("flux_pictures_refused_total", {"reason": "deadline_impossible"}, 5),
        ("flux_deadline_misses_total", {}, 6),
        ("flux_downgrades_total", {"reason": "deadline"}, 7),
        ("flux_downgrades_total", {"reason": "load"}, 8),
        ("flux_decision_seconds_total", {"decision": "computed"}, 0.5),
        ("flux_decision_seconds_total", {"decision": "reused"}, 0.25),
        ("flux_saved_seconds_total", {}, 0.5),
    ]
    for name, labels, value in expected:
        assert registry.get_sample_value(name, LABELS | labels) == value, name


def test_requests_by_outcome_and_error() -> None:
    registry = CollectorRegistry()
    metrics = ApiMetrics(registry, "m")
    metrics.observe_request("ok", 200, 0.5)
    metrics.observe_request("busy", 429, 0.25, code="busy")
    outcome = {"model": "m", "outcome": "busy"}
    assert registry.get_sample_value("flux_requests_total", outcome | {"status_class": "4xx"}) == 1
    assert registry.get_sample_value("flux_request_duration_seconds_sum", outcome) == 0.25
    assert registry.get_sample_value("flux_request_errors_total", {"model": "m", "code": "busy"}) == 1
    assert registry.get_sample_value("flux_request_errors_total", {"model": "m", "code": "unavailable"}) == 0


@dataclass(frozen=True)
class _Everything:
    registry: CollectorRegistry
    api: ApiMetrics
    coordinator: CoordinatorMetrics
    encoder: EncoderMetrics


@pytest.fixture
def everything() -> _Everything:
    registry = CollectorRegistry()
    return _Everything(
        registry,
        ApiMetrics(registry, "m"),
        CoordinatorMetrics(registry, "m", "r", CoordinatorCounters()),
        EncoderMetrics(registry, "m"),
    )


def test_the_catalogue_is_what_is_exposed(everything: _Everything) -> None:
    everything.coordinator.observe_step(_plan((True,)), [0.01])
    exposed = {family.name: family for family in everything.registry.collect()}
    assert set(exposed) == {spec.name for spec in CATALOGUE}
    for spec in CATALOGUE:
        family = exposed[spec.name]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        # The series of unlabelled and of known label values are there before anything happens.
        assert family.samples, spec.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {*COMMON[spec.owner], *spec.labels}


def test_names_follow_prometheus() -> None:
    for spec in CATALOGUE:
        assert spec.name.startswith("flux_")
        assert spec.help.endswith(".")
        assert not spec.name.endswith("_total"), "prometheus_client adds it"
        if spec.unit in ("seconds", "bytes"):
            assert spec.name.endswith(f"_{spec.unit}"), spec.name
        assert (spec.kind == "histogram") == bool(spec.buckets)
        assert list(spec.buckets) == sorted(set(spec.buckets))
        free = {name for name, values in spec.labels.items() if not values}
        assert free <= BOUNDED or spec.name == "flux_build_info", spec.name


def test_the_document_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs/metrics.md"
    assert path.read_text(encoding="utf-8") == document(), "run `make metrics`"


def test_exemplars_name_the_request_in_openmetrics(everything: _Everything) -> None:
    long = "x" * 128  # as long as the API lets an id be, longer than OpenMetrics lets an exemplar
    everything.api.observe_phases(queue_s=0, encode_s=0, denoise_s=1, decode_s=0, total_s=2, request_id=long)
    everything.api.observe_request("ok", 200, 2.0, request_id="req-1")
    everything.coordinator.observe_request(DenoiseReport("C.", 1, 1, 0.1, None, 0.0, 0.1), "req-1")
    families = Families(merge_families(everything.registry.collect()))
    found: dict[str, set[str]] = {}
    for family in openmetrics_families(openmetrics.generate_latest(families).decode()):
        for sample in family.samples:
            if sample.exemplar is not None:
                found.setdefault(family.name, set()).add(sample.exemplar.labels["request_id"])
    assert set(found) == {spec.name for spec in CATALOGUE if spec.exemplars}
    assert found["flux_request_duration_seconds"] == {"req-1"}
    assert found["flux_phase_duration_seconds"] == {long[:118]}


def test_replicas_share_a_family() -> None:
    first, one = _metrics("r1")
    second, two = _metrics("r2")
    one.running(1)
    two.running(2)
    text = generate_latest(Families(merge_families(first.collect(), second.collect()))).decode()
    assert text.count("# TYPE flux_running_pictures gauge") == 1
    values = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "flux_running_pictures"
    }
    assert values == {"r1": 1, "r2": 2}


def test_merging_leaves_the_sources_alone() -> None:
    registry = CollectorRegistry()
    Counter("flux_things", "Things.", registry=registry).inc()
    families = list(registry.collect())
    before = [list(family.samples) for family in families]
    merge_families(families, [CounterMetricFamily("flux_others", "Others.", 1)])
    assert [family.samples for family in families] == before


def test_contradicting_sources_are_an_error() -> None:
    counter = CounterMetricFamily("flux_things", "Things.", 1)
    with pytest.raises(ValueError, match="counter in one source and a gauge"):
        merge_families([counter], [GaugeMetricFamily("flux_things", "Things.", 1)])
    with pytest.raises(ValueError, match="two sources"):
        merge_families([counter], [counter])
