"""The catalogue counts what it says, and several sources make one valid exposition."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from app.engine.messages import COND, UNCOND, BranchStep, DenoiseReport, RowStep, StepPlan
from app.metrics import ApiMetrics, CoordinatorMetrics, Families, merge_families

LABELS = {"model": "m", "replica": "r"}


def _metrics(replica: str = "r") -> tuple[CollectorRegistry, CoordinatorMetrics]:
    registry = CollectorRegistry()
    return registry, CoordinatorMetrics(registry, model="m", replica=replica)


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
    metrics.observe_step(_plan((True,), (False,), (True, False)), 0.02, wait_seconds=0.25)
    metrics.observe_step(_plan((False,)), 0.001)
    metrics.observe_step(StepPlan(2, "0" * 16, drop=("q/0",)), 0.001)

    def steps(decision: str, branch: str) -> float | None:
        return registry.get_sample_value("flux_steps_total", {**LABELS, "decision": decision, "branch": branch})

    assert (steps("computed", COND), steps("reused", COND)) == (2, 2)
    assert (steps("computed", UNCOND), steps("reused", UNCOND)) == (0, 1)
    assert registry.get_sample_value("flux_step_batch_rows_sum", LABELS) == 2
    assert registry.get_sample_value("flux_step_batch_rows_count", LABELS) == 2
    assert registry.get_sample_value("flux_plan_wait_seconds_sum", LABELS) == 0.25
    assert registry.get_sample_value("flux_plan_wait_seconds_count", LABELS) == 2
    for kind, seconds in (("computed", 0.02), ("reused", 0.001)):
        assert registry.get_sample_value("flux_step_duration_seconds_sum", {**LABELS, "kind": kind}) == seconds


def test_requests_and_gauges() -> None:
    registry, metrics = _metrics()
    metrics.observe_request(DenoiseReport("CC..", 2, 6, 0.1, None, 0.0, 0.1))
    metrics.running(3)
    metrics.waiting(2)
    metrics.residual_bytes(4096)
    metrics.group_rebuilt()
    metrics.digest_mismatch()
    assert registry.get_sample_value("flux_request_skip_ratio_sum", LABELS) == 0.75
    for name, value in (
        ("flux_running_pictures", 3), ("flux_waiting_pictures", 2), ("flux_residual_bytes", 4096),
        ("flux_group_rebuilds_total", 1), ("flux_digest_mismatches_total", 1),
    ):  # fmt: skip
        assert registry.get_sample_value(name, LABELS) == value


def test_names_follow_prometheus() -> None:
    registry, _ = _metrics()
    ApiMetrics(registry)
    for family in registry.collect():
        assert family.name.startswith("flux_")
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_ratio", "_rows"))


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
