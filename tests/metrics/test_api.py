"""What the API counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from app.metrics import ApiMetrics


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
