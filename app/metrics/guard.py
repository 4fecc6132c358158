"""The metrics of the quality guard."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry

from app.messages.jobs import ImageKind
from app.metrics.instruments import Instruments


class GuardMetrics:
    """Writes the quality guard's metrics, labelled with the model and the API process."""

    def __init__(self, registry: CollectorRegistry, model: str, process: str, target_db: float) -> None:
        self._made = Instruments(registry, "guard", {"model": model, "process": process})
        self._made.gauge("flux_guard_target_db").set(target_db)

    def sampled(self, result: Literal["compared", "dropped", "failed"]) -> None:
        """Count one sampled image by what became of it."""
        self._made.counter("flux_guard_samples", result).inc()

    def compared(self, kind: ImageKind, computed: int, psnr_db: float, ssim: float) -> None:
        """Record one image's likeness to its uncached one."""
        labels = kind.profile, str(computed)
        self._made.histogram("flux_guard_psnr_db", *labels).observe(psnr_db)
        self._made.histogram("flux_guard_ssim", *labels).observe(ssim)
        self.sampled("compared")

    def holds(self, kind: ImageKind, budget: int, worst_tenth_db: float | None) -> None:
        """Set what a kind of images has now."""
        labels = kind.profile, str(kind.steps), str(kind.guided).lower()
        self._made.gauge("flux_guard_budget_steps", *labels).set(budget)
        self._made.gauge("flux_guard_worst_tenth_db", *labels).set(
            float("nan") if worst_tenth_db is None else worst_tenth_db
        )

    def changed(self, direction: Literal["up", "down"]) -> None:
        """Count a change of a budget."""
        self._made.counter("flux_guard_changes", direction).inc()
