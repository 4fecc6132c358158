"""An application's coordinators are found by their actors' names, and only those that answer count."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import ray

from app.cluster.coordinators import Coordinators
from app.cluster.group import COORDINATOR_NAME, namespace
from tests.cluster.actors import Named

OWN = namespace("own")


@pytest.fixture
def named(cluster: None) -> Iterator[None]:
    actors = [
        Named.options(name=name, namespace=where).remote(name.rpartition(":")[2])
        for name, where in (
            (f"{COORDINATOR_NAME}:one", OWN),
            (f"{COORDINATOR_NAME}:hanging", OWN),
            ("another", OWN),
            (f"{COORDINATOR_NAME}:of another application", namespace("another")),
        )
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    yield
    for actor in actors:
        ray.kill(actor)


async def test_those_that_answer_in_time_are_heard_and_no_others(named: None) -> None:
    answers = await asyncio.wait_for(Coordinators("own").call("greet", "hello"), 60)
    assert answers == ["hello from one"]
