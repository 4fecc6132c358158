"""What the API counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from app.metrics import ApiMetrics
from app.metrics.catalogue import MAX_KEYS, MAX_LORAS

LABELS = {"model": "m", "process": "p"}


def test_requests_by_outcome_and_error() -> None:
    registry = CollectorRegistry()
    metrics = ApiMetrics(registry, "m", "p")
    metrics.observe_request("ok", 200, 0.5)
    metrics.observe_request("busy", 429, 0.25, code="busy")
    outcome = {**LABELS, "outcome": "busy"}
    assert registry.get_sample_value("flux_requests_total", outcome | {"status_class": "4xx"}) == 1
    assert registry.get_sample_value("flux_request_duration_seconds_sum", outcome) == 0.25
    assert registry.get_sample_value("flux_request_errors_total", {**LABELS, "code": "busy"}) == 1
    assert registry.get_sample_value("flux_request_errors_total", {**LABELS, "code": "unavailable"}) == 0


def test_requests_by_key_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = ApiMetrics(registry, "m", "p")
    metrics.observe_request("ok", 200, 0.5)
    for number in (*range(MAX_KEYS + 5), 0, 0):
        metrics.observe_request("ok", 200, 0.5, key_name=f"key-{number}")
    metrics.observe_request("busy", 429, 0.5, key_name="key-0")

    def counted(key: str, outcome: str = "ok") -> float | None:
        labels = {**LABELS, "key": key, "outcome": outcome}
        return registry.get_sample_value("flux_key_requests_total", labels)

    assert (counted("key-0"), counted("key-0", "busy"), counted(f"key-{MAX_KEYS - 1}")) == (3, 1, 1)
    assert (counted("other"), counted(f"key-{MAX_KEYS}"), counted("")) == (5, None, None)


def test_requests_by_adapter_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = ApiMetrics(registry, "m", "api-0")
    metrics.observe_request("ok", 200, 0.5, loras=["a", "b"])
    metrics.observe_request("failed", 500, 0.5, loras=["b"])
    for number in range(MAX_LORAS):
        metrics.observe_request("ok", 200, 0.5, loras=[f"lora-{number}"])

    def counted(lora: str, outcome: str = "ok") -> float | None:
        labels = {"model": "m", "process": "api-0", "lora": lora, "outcome": outcome}
        return registry.get_sample_value("flux_lora_requests_total", labels)

    assert (counted("a"), counted("b"), counted("b", "failed")) == (1, 1, 1)
    assert (counted("other"), counted(f"lora-{MAX_LORAS - 1}")) == (2, None)
