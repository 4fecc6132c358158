"""What the quality guard exports."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry

from app.messages.jobs import ImageKind
from app.metrics import GuardMetrics

KIND = ImageKind("flux-tiny@0123456789ab", 28, guided=True)


def test_images_go_into_histograms_and_kinds_into_gauges() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry, "m", "p", 38.0)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "m", "process": "p", **labels})

    metrics.compared(KIND, 10, 41.0, 0.97)
    metrics.compared(KIND, 11, 44.0, 0.99)
    metrics.sampled("dropped")
    metrics.changed("up")
    at_ten = {"profile": KIND.profile, "computed": "10"}
    assert value("flux_guard_target_db") == 38.0
    assert value("flux_guard_psnr_db_bucket", **at_ten, le="40.0") == 0.0
    assert value("flux_guard_psnr_db_bucket", **at_ten, le="45.0") == 1.0
    assert value("flux_guard_ssim_sum", **at_ten) == 0.97
    results = ("compared", "dropped", "failed")
    assert [value("flux_guard_samples_total", result=result) for result in results] == [2, 1, 0]
    assert [value("flux_guard_changes_total", direction=direction) for direction in ("up", "down")] == [1, 0]
    of_kind = {"profile": KIND.profile, "steps": "28", "guided": "true"}
    metrics.holds(KIND, 11, 38.5)
    assert (value("flux_guard_budget_steps", **of_kind), value("flux_guard_worst_tenth_db", **of_kind)) == (11, 38.5)
    metrics.holds(KIND, 12, None)
    assert math.isnan(value("flux_guard_worst_tenth_db", **of_kind) or 0.0)
