"""What the prompt encoder counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from app.metrics import EncoderMetrics


def test_prompts_are_counted_by_where_their_embeddings_came_from() -> None:
    registry = CollectorRegistry()
    metrics = EncoderMetrics(registry, "m", "p")
    metrics.looked_up("miss")
    metrics.looked_up("hit")
    metrics.looked_up("hit")
    counted = {
        result: registry.get_sample_value(
            "flux_prompt_cache_lookups_total", {"model": "m", "process": "p", "result": result}
        )
        for result in ("hit", "shared", "miss")
    }
    assert counted == {"hit": 2, "shared": 0, "miss": 1}
