"""The metrics of the HTTP side."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from app.metrics.catalogue import MAX_KEYS, MAX_LORAS, OUTCOMES, PHASES
from app.metrics.instruments import FirstNames, Instruments, exemplar


class ApiMetrics:
    """Writes the HTTP side's metrics, labelled with the model and the API process."""

    def __init__(self, registry: CollectorRegistry, model: str, process: str) -> None:
        self._made = Instruments(registry, "api", {"model": model, "process": process})
        self._keys = FirstNames(MAX_KEYS)
        self._loras = FirstNames(MAX_LORAS)
        for outcome, status_class in zip(OUTCOMES, ("2xx", "4xx", "4xx", "5xx", "5xx", "4xx"), strict=True):
            self._made.counter("flux_requests", outcome, status_class)
        releases = (version(name) for name in ("flux-magcache-serve", "torch", "diffusers", "ray"))
        self._made.gauge("flux_build_info", *releases).set(1)

    def observe_request(
        self,
        outcome: str,
        status: int,
        seconds: float,
        *,
        code: str | None = None,
        request_id: str | None = None,
        key_name: str = "",
        loras: Sequence[str] = (),
    ) -> None:
        """Count one image request that ended with the HTTP status ``status``, and the error ``code`` if any.

        Args:
            key_name: of the API key that it came with; empty for none.
            loras: names of its adapters.
        """
        if key_name:
            self._made.counter("flux_key_requests", self._keys.label(key_name), outcome).inc()
        for name in loras:
            self._made.counter("flux_lora_requests", self._loras.label(name), outcome).inc()
        if code is not None:
            self._made.counter("flux_request_errors", code).inc()
        self._made.counter("flux_requests", outcome, f"{status // 100}xx").inc()
        self._made.histogram("flux_request_duration_seconds", outcome).observe(seconds, exemplar(request_id))

    def joined(self) -> None:
        """Count one image that a repeated request got from the one before."""
        self._made.counter("flux_pictures_joined").inc()

    def observe_phases(
        self,
        *,
        queue_s: float,
        encode_s: float,
        denoise_s: float,
        decode_s: float,
        total_s: float,
        request_id: str | None = None,
    ) -> None:
        """Record one image's time in each phase."""
        for phase, seconds in zip(PHASES, (queue_s, encode_s, denoise_s, decode_s, total_s), strict=True):
            self._made.histogram("flux_phase_duration_seconds", phase).observe(seconds, exemplar(request_id))
