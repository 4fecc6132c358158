"""An application's coordinators are found by their actors' names, and only those that answer count."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray

import app.cluster.coordinators
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


async def test_a_late_look_up_still_finds_the_one_in_the_place_of_another(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str) -> Any:
        actor = Named.options(name=f"{COORDINATOR_NAME}:{name}", namespace=namespace("late")).remote(name)
        ray.get(actor.__ray_ready__.remote())
        return actor

    coordinators = Coordinators("late")
    first = start("first")
    assert await coordinators.call("greet", "hello") == ["hello from first"]
    monkeypatch.setattr(app.cluster.coordinators, "LOOKUP_SECONDS", 0.0)
    ray.kill(first)
    second = start("second")
    assert await coordinators.call("greet", "hello") == ["hello from second"]
    assert await coordinators.call("greet", "hello") == ["hello from second"]
    ray.kill(second)
