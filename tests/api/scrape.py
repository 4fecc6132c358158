"""What `/metrics` says."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def samples_of(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def requests_with(outcome: str, status_class: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return "flux_requests_total", frozenset(
        {("model", "flux-tiny"), ("process", "api"), ("outcome", outcome), ("status_class", status_class)}
    )
