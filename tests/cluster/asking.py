"""Requests to the running service, what it answers, and the deaths of its processes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.patience import wait_for

PROMPT = "a red circle on a blue background"
IMAGES = "/v1/images/generations"


def pixels(image: Any) -> np.ndarray:
    data = image["b64_json"] if isinstance(image, dict) else image.b64_json
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) / 255


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    reply = http.post(IMAGES, json={"prompt": PROMPT, "seed": 7, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample of ``/metrics``, summed over its labels but ``decision``.

    A scrape leaves out a coordinator that does not answer in time, so this asks until one has answered.
    """
    totals: dict[str, float] = {}

    def has_the_coordinators() -> bool:
        totals.clear()
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                name = sample.name + (f":{sample.labels['decision']}" if "decision" in sample.labels else "")
                totals[name] = totals.get(name, 0.0) + sample.value
        return "flux_group_rebuilds_total" in totals

    wait_for(has_the_coordinators, "a coordinator's metrics are in the scrape")
    return totals


def events_of(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, as they come."""
    for line in reply.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def newest_process(name: str) -> psutil.Process:
    """An actor's process of this test's own cluster, found by the class that its title shows."""
    workers = psutil.Process().children(recursive=True)
    return [worker for worker in workers if "".join(worker.cmdline()).startswith(f"ray::{name}")][-1]


def kill_process(name: str) -> None:
    """Kill -9 the newest actor's process of a class."""
    newest_process(name).kill()
