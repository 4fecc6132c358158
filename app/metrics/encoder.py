"""The metrics of the prompt encoder."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry

from app.metrics.instruments import Instruments


class EncoderMetrics:
    """Writes the prompt encoder's metrics, labelled with the model and the process that the encoder is in."""

    def __init__(self, registry: CollectorRegistry, model: str, process: str) -> None:
        self._made = Instruments(registry, "encoder", {"model": model, "process": process})

    def looked_up(self, result: Literal["hit", "shared", "miss"]) -> None:
        """Count one prompt by where its embeddings came from."""
        self._made.counter("flux_prompt_cache_lookups", result).inc()
