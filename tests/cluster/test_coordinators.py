"""Coordinators are found by their actors' names, and only those that answer count."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import ray

from app.cluster.coordinators import call_all_coordinators
from app.cluster.group import COORDINATOR_NAME, NAMESPACE
from tests.cluster.actors import Named


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
