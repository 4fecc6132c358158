"""``serve deploy`` of changed settings while clients ask for images: each gets its image, from old or new processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.service_process import ServiceProcess, service_process, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]  # six groups start, one after another

IMAGES = "/v1/images/generations"
LONG = {"prompt": "a red circle", "magcache": {"enabled": False}}
CLIENTS = 4
STEPS = 28
# Logical CPUs, of the two that Ray counts on a small machine; the API takes 0.1.
WHOLE, PART = 1.2, 0.3
CHANGES = [
    (26, {"cpus_per_rank": WHOLE, "num_replicas": 1}),  # no room for another group: requests wait
    (24, {"cpus_per_rank": PART, "num_replicas": 2}),
    (22, {"cpus_per_rank": PART, "num_replicas": 2}),  # two groups, one after the other
]
"""Default steps, and what else changes."""


def deploy(service: ServiceProcess, steps: int, change: dict[str, Any]) -> None:
    """As an operator does it, with the token that Ray keeps in the home folder."""
    path = service.log.parent / "config.yaml"
    config = yaml.safe_load(path.read_text())
    args = config["applications"][0]["args"]
    args |= change
    args["sampling"]["num_inference_steps"] = steps
    path.write_text(yaml.safe_dump(config))
    (dashboard,) = re.findall(r"View the dashboard at \S*?(http://[\w.:]+)", service.log.read_text())
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "deploy", str(path)]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    subprocess.run([*command, "--address", dashboard], env=environment, check=True, timeout=120)


@dataclass(frozen=True)
class Processes:
    """The API processes and the groups, by the names that metrics call them."""

    apis: frozenset[str]
    groups: frozenset[str]


def processes(service: ServiceProcess) -> Processes:
    """Those that answer at the moment."""
    try:
        text = service.client.get("/metrics").text
    except httpx.TransportError:
        return Processes(frozenset(), frozenset())
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    apis = frozenset(one.labels["process"] for one in samples if "process" in one.labels)
    return Processes(apis, frozenset(one.labels["replica"] for one in samples if one.name == "flux_group_up"))


def is_replaced(service: ServiceProcess, before: Processes, groups: int) -> bool:
    """Whether none of the processes ``before`` is left, and so many groups work."""
    now = processes(service)
    return len(now.groups) == groups and now.groups.isdisjoint(before.groups) and now.apis.isdisjoint(before.apis)


def steps_of_images(service: ServiceProcess, over: threading.Event) -> list[int]:
    """Ask for one image after the other until ``over``; the steps of each, which tell the settings it was made with."""
    steps = []
    while not over.is_set():
        reply = service.client.post(IMAGES, json=LONG)
        assert reply.status_code == 200, reply.text
        steps.append(len(reply.json()["data"][0]["magcache"]["schedule"]))
    return steps


def test_no_request_fails_while_settings_change(tmp_path: Path) -> None:
    one = {"tensor_parallel_size": 1, "cpus_per_rank": WHOLE, "cpus_per_helper": 0.1, "drain_seconds": 60.0}
    with service_process(tmp_path, **one) as service, ThreadPoolExecutor(CLIENTS) as pool:
        over = threading.Event()
        clients = [pool.submit(steps_of_images, service, over) for _ in range(CLIENTS)]
        try:
            for steps, change in CHANGES:
                wait_until(lambda: service.metric("flux_running_pictures") > 0)
                before = processes(service)
                deploy(service, steps, change)
                wait_until(partial(is_replaced, service, before, change["num_replicas"]))
        finally:
            over.set()
        made = [client.result() for client in clients]
    assert {steps for each in made for steps in each} == {STEPS, *(steps for steps, _ in CHANGES)}
