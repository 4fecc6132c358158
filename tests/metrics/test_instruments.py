"""Exemplars name the request."""

from __future__ import annotations

from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from app.messages.results import DenoiseReport
from app.metrics import CATALOGUE, Families, merge_families
from tests.metrics.owners import Everything


def test_exemplars_name_the_request_in_openmetrics(everything: Everything) -> None:
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
