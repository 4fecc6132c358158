"""The metrics of the calibrations that an API process runs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from app.messages.calibration import CalibrationStatus
from app.metrics.catalogue import MAX_PROFILES
from app.metrics.instruments import FirstNames, Instruments


class CalibrationMetrics:
    """Writes the metrics of calibrations, labelled with the model and the API process."""

    def __init__(self, registry: CollectorRegistry, model: str, process: str) -> None:
        self._made = Instruments(registry, "calibration", {"model": model, "process": process})
        self._profiles = FirstNames(MAX_PROFILES)

    def at(self, profile: str, status: CalibrationStatus) -> None:
        """Set how far the calibration that makes ``profile`` is."""
        self._made.gauge("flux_calibration_progress", self._profiles.label(profile)).set(status.progress)

    def ran(self, profile: str, phase: str, seconds: float) -> None:
        """Count one run of the calibration that makes ``profile``."""
        label = self._profiles.label(profile)
        self._made.counter("flux_calibration_profile_runs", label, phase).inc()
        self._made.counter("flux_calibration_profile_seconds", label).inc(seconds)

    def ended(self, status: CalibrationStatus) -> None:
        """Count a calibration that has ended."""
        self._made.counter("flux_calibrations", status.state).inc()
