"""Coordinators are found by their actors' names, and only those that answer count."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from app.cluster.coordinators import call_all_coordinators
from app.cluster.group import COORDINATOR_NAME, NAMESPACE
from tests.cluster.actors import Named
from tests.service_process import service_process, wait_until

ANSWER_S = 5.0
"""More than an API process takes (2 s), and far less than Ray's own minute; for a busy machine."""


@pytest.fixture
def named(cluster: None) -> Iterator[None]:
    actors = [
        Named.options(name=name, namespace=namespace).remote(name.rpartition(":")[2])
        for name, namespace in (
            (f"{COORDINATOR_NAME}:one", NAMESPACE),
            (f"{COORDINATOR_NAME}:hanging", NAMESPACE),
            ("another", NAMESPACE),
            (f"{COORDINATOR_NAME}:one", "elsewhere"),
        )
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    yield
    for actor in actors:
        ray.kill(actor)


async def test_those_that_answer_in_time_are_heard_and_no_others(named: None) -> None:
    answers = await asyncio.wait_for(call_all_coordinators("greet", "hello"), 60)
    assert answers == ["hello from one"]


@pytest.mark.faults
def test_they_are_asked_without_the_gcs_that_looks_them_up(tmp_path: Path) -> None:
    with service_process(tmp_path, tensor_parallel_size=1) as service:
        assert service.metric("flux_running_pictures") == 0
        (gcs,) = [each for each in service.processes() if each.name() == "gcs_server"]
        gcs.send_signal(signal.SIGKILL)
        wait_until(lambda: not gcs.is_running() or gcs.status() == psutil.STATUS_ZOMBIE)
        with httpx.Client(base_url=service.client.base_url, timeout=ANSWER_S) as client:
            for _ in range(3):
                health = client.get("/health")
                assert (health.status_code, health.json()["details"]["groups_ready"]) == (200, 1)
                assert "flux_running_pictures{" in client.get("/metrics").text
