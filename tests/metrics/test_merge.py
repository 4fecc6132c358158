"""Several sources make one valid exposition."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Families, merge_families
from tests.metrics.owners import coordinator_metrics


def test_replicas_share_a_family() -> None:
    first, one = coordinator_metrics("r1")
    second, two = coordinator_metrics("r2")
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
