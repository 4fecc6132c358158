"""What calibrations export."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from app.messages.calibration import CalibrationStatus
from app.metrics import CalibrationMetrics
from app.metrics.catalogue import MAX_PROFILES, OTHER

STATUS = CalibrationStatus("calibration-1", "running", "record", 5, 20, 2.5)


def test_progress_runs_and_ends() -> None:
    registry = CollectorRegistry()
    metrics = CalibrationMetrics(registry, "m", "p")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "m", "process": "p", **labels})

    for phase, seconds in (("record", 0.5), ("record", 1.0), ("try", 0.25)):
        metrics.ran("own", phase, seconds)
    metrics.at("own", STATUS)
    assert value("flux_calibration_progress", profile="own") == 0.25
    phases = ("record", "probe", "try")
    assert [value("flux_calibration_profile_runs_total", profile="own", phase=phase) for phase in phases] == [
        2,
        None,
        1,
    ]
    assert value("flux_calibration_profile_seconds_total", profile="own") == 1.75
    done = replace(STATUS, state="done", profile="own@1")
    metrics.at("own", done)
    metrics.ended(done)
    assert value("flux_calibration_progress", profile="own") == 1.0
    results = ("done", "cancelled", "failed")
    assert [value("flux_calibrations_total", result=result) for result in results] == [1, 0, 0]


def test_profiles_beyond_a_number_share_a_series() -> None:
    registry = CollectorRegistry()
    metrics = CalibrationMetrics(registry, "m", "p")
    for number in range(MAX_PROFILES + 5):
        metrics.ran(f"own-{number}", "record", 1.0)
        metrics.at(f"own-{number}", STATUS)
    for family in registry.collect():
        assert len(family.samples) <= 2 * (MAX_PROFILES + 1)
    labels = {"model": "m", "process": "p", "profile": OTHER}
    assert registry.get_sample_value("flux_calibration_profile_seconds_total", labels) == 5.0
