"""``python -m app.serve`` as a real process, told in order: settings change under load, and SIGTERM ends it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.serve import RAY_ENVIRONMENT
from tests.patience import ANSWER_S, wait_for
from tests.service_process import START_S, ServiceProcess, service_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]  # five groups start, one after another

IMAGES = "/v1/images/generations"
UNCACHED = {"prompt": "a red circle", "magcache": {"enabled": False}}
LONG = {**UNCACHED, "num_inference_steps": 60, "response_format": "file"}
CLIENTS = 4
STEPS = 28
# Logical CPUs, of the two that Ray counts on a small machine; the API takes 0.1.
PART, WHOLE = 0.2, 1.6
CHANGES = [
    (26, {"cpus_per_rank": PART, "num_replicas": 2}),  # two groups, one after the other
    (24, {"cpus_per_rank": WHOLE, "num_replicas": 1}),  # no room beside what runs: requests wait
]
"""Default steps, and what else changes."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    two = {"tensor_parallel_size": 1, "cpus_per_rank": PART, "num_replicas": 2}
    more = {"cpus_per_helper": 0.1, "drain_seconds": 300.0}
    with service_process(tmp_path_factory.mktemp("serve"), **two, **more) as service:
        yield service


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
    subprocess.run([*command, "--address", dashboard], env=environment, check=True, timeout=ANSWER_S)


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
        reply = service.client.post(IMAGES, json=UNCACHED)
        assert reply.status_code == 200, reply.text
        steps.append(len(reply.json()["data"][0]["magcache"]["schedule"]))
    return steps


def test_no_request_fails_while_settings_change(service: ServiceProcess) -> None:
    """``serve deploy`` while clients ask for images: each gets its image, from old or new processes."""
    over = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(steps_of_images, service, over) for _ in range(CLIENTS)]
        try:
            for steps, change in CHANGES:
                wait_for(lambda: service.metric("flux_running_pictures") > 0, "an image runs")
                before = processes(service)
                deploy(service, steps, change)
                wait_for(partial(is_replaced, service, before, change["num_replicas"]), "all are replaced", START_S)
        finally:
            over.set()
        made = [client.result() for client in clients]
    assert {steps for each in made for steps in each} == {STEPS, *(steps for steps, _ in CHANGES)}


# Last, since nothing of the service is left.
def test_sigterm_loses_no_image(service: ServiceProcess) -> None:
    """Requests under way end with their images, later ones are refused."""
    with ThreadPoolExecutor(6) as pool:
        under_way = [pool.submit(service.client.post, IMAGES, json=LONG | {"seed": seed}) for seed in range(6)]
        wait_for(lambda: service.metric("flux_running_pictures") == 6, "all images run")
        (raylet,) = (each for each in service.processes() if each.name() == "raylet")
        assert raylet.environ().items() >= RAY_ENVIRONMENT.items(), "all that it starts inherits it"
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: service.health() == 503, "it stops")
        assert not any(each.done() for each in under_way)
        refused = service.client.post(IMAGES, json=LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the service is stopping; ask again"
        assert int(refused.headers["retry-after"]) >= 1
        for reply in (each.result() for each in under_way):
            assert reply.status_code == 200
            Image.open(io.BytesIO(reply.content)).load()
        assert service.process.wait(400) == 0, service.log.read_text()
        wait_for(lambda: not service.processes(), "nothing of it is left")
