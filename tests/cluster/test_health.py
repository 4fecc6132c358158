"""What /health says, without a cluster: what it makes of the parts' answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import ray

from app.cluster import health as module
from app.cluster.coordinators import Coordinators
from app.cluster.health import Health
from app.messages.results import GroupStart
from app.settings import Settings


class Part:
    """Stands for the encoder or the decoder."""

    def __init__(self) -> None:
        self.asked = 0
        self.hangs = False

    async def ping(self) -> None:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()


class Replicas:
    """Stands for the replicas' handle: what all of them answer to a broadcast."""

    def __init__(self) -> None:
        self.troubles: list[str | None] = [None]
        self.hangs = False

    def broadcast(self, method: str) -> Replicas:
        assert method == "trouble"
        return self

    async def results_async(self, return_exceptions: bool) -> list[object]:
        if self.hangs:
            await asyncio.Event().wait()
        return [*self.troubles, ray.exceptions.ActorDiedError()]


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def part() -> Part:
    return Part()


class Asked(Coordinators):
    """Stands for the coordinators: what all of them answer, by method."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {}

    async def call(self, method: str, *args: object) -> list[Any]:
        await asyncio.sleep(0)
        return self.answers.get(method, [])


@pytest.fixture
def coordinators() -> Asked:
    return Asked()


@pytest.fixture
def health(part: Part, replicas: Replicas, coordinators: Asked) -> Health:
    return Health(Settings(num_replicas=2), part, replicas, part, coordinators)


async def test_health_tells_why_groups_are_not_ready(
    health: Health, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", -1.0)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    assert (await health.report()).details["troubles"] == []
    replicas.troubles = [None, "rebuild 1 of 3 is under way: a rank hangs"]
    assert (await health.report()).details["troubles"] == ["rebuild 1 of 3 is under way: a rank hangs"]
    replicas.hangs = True
    assert (await asyncio.wait_for(health.report(), 60)).details["troubles"] == []


@pytest.mark.parametrize(
    ("answers", "ready", "counted"),
    [([True, True], True, (2, 2)), ([True], True, (1, 2)), ([False, True, True], True, (2, 3)),
     ([False, False], False, (0, 2)), ([], False, (0, 2))],
)  # fmt: skip
async def test_one_whole_group_is_enough(
    health: Health, coordinators: Asked, answers: list[bool], ready: bool, counted: tuple[int, int]
) -> None:
    coordinators.answers["ready"] = answers
    report = await health.report()
    assert report.ready == ready
    assert (report.details["groups_ready"], report.details["groups"]) == counted


async def test_health_tells_how_far_starting_groups_are(health: Health, coordinators: Asked) -> None:
    start = GroupStart("r0", "loading", (3, 5), checkpoint_bytes=9)
    coordinators.answers = {"starting": [start, None], "ready": [True]}
    report = await health.report()
    assert (report.ready, report.details["groups_ready"]) == (True, 1)
    (told,) = json.loads(json.dumps(report.details))["starting"]
    assert told == {"replica": "r0", "phase": "loading", "read_bytes": [3, 5], "checkpoint_bytes": 9}


async def test_probes_share_a_look(
    health: Health, part: Part, coordinators: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinators.answers["ready"] = [True]
    monkeypatch.setattr(module, "LOOK_S", 3600.0)
    reports = [*await asyncio.gather(*(health.report() for _ in range(9))), await health.report()]
    assert part.asked == 2, "the encoder's and the decoder's"
    assert all(report.ready for report in reports)
    monkeypatch.setattr(module, "LOOK_S", -1.0)
    part.hangs = True
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    late = await asyncio.wait_for(health.report(), 60)
    assert (late.ready, late.details["encoder_ready"], late.details["decoder_ready"]) == (False, False, False)
