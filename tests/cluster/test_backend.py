"""The API's backend without a cluster: what it makes of the other parts' answers."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import ray
import torch

from app.api.backend import ImagesJob, SourcePixels
from app.cluster import backend as module
from app.cluster import image_call
from app.cluster.backend import ServeBackend
from app.control.demand import Measurable
from app.engine.families import FLUX2_KLEIN, Family
from app.errors import BusyError
from app.messages.conditioning import PromptEmbeddings, SourceImage
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.loras import LoraUse
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


@pytest.fixture
def backend(part: Part, replicas: Replicas) -> ServeBackend:
    return ServeBackend(Settings(num_replicas=2), part, replicas, part)


async def test_health_tells_why_groups_are_not_ready(
    backend: ServeBackend, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call(method: str) -> list[Any]:
        return []

    monkeypatch.setattr(module, "call_all_coordinators", call)  # which would start a Ray
    monkeypatch.setattr(module, "LOOK_S", -1.0)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    assert (await backend.health()).details["troubles"] == []
    replicas.troubles = [None, "rebuild 1 of 3 is under way: a rank hangs"]
    assert (await backend.health()).details["troubles"] == ["rebuild 1 of 3 is under way: a rank hangs"]
    replicas.hangs = True
    assert (await asyncio.wait_for(backend.health(), 60)).details["troubles"] == []


@pytest.mark.parametrize(
    ("answers", "ready", "counted"),
    [([True, True], True, (2, 2)), ([True], True, (1, 2)), ([False, True, True], True, (2, 3)),
     ([False, False], False, (0, 2)), ([], False, (0, 2))],
)  # fmt: skip
async def test_one_whole_group_is_enough(
    backend: ServeBackend, monkeypatch: pytest.MonkeyPatch, answers: list[bool], ready: bool, counted: tuple[int, int]
) -> None:
    async def call(method: str) -> list[Any]:
        return answers if method == "ready" else []

    monkeypatch.setattr(module, "call_all_coordinators", call)
    report = await backend.health()
    assert report.ready == ready
    assert (report.details["groups_ready"], report.details["groups"]) == counted


async def test_health_tells_how_far_starting_groups_are(backend: ServeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    start = GroupStart("r0", "loading", (3, 5), checkpoint_bytes=9)

    async def call(method: str) -> list[Any]:
        return [start, None] if method == "starting" else [True]

    monkeypatch.setattr(module, "call_all_coordinators", call)
    report = await backend.health()
    assert (report.ready, report.details["groups_ready"]) == (True, 1)
    (told,) = json.loads(json.dumps(report.details))["starting"]
    assert told == {"replica": "r0", "phase": "loading", "read_bytes": [3, 5], "checkpoint_bytes": 9}


async def test_probes_share_a_look(backend: ServeBackend, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(method: str) -> list[Any]:
        await asyncio.sleep(0)
        return [True] if method == "ready" else []

    monkeypatch.setattr(module, "call_all_coordinators", call)
    monkeypatch.setattr(module, "LOOK_S", 3600.0)
    reports = [*await asyncio.gather(*(backend.health() for _ in range(9))), await backend.health()]
    assert part.asked == 2, "the encoder's and the decoder's"
    assert all(report.ready for report in reports)
    monkeypatch.setattr(module, "LOOK_S", -1.0)
    part.hangs = True
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    late = await asyncio.wait_for(backend.health(), 60)
    assert (late.ready, late.details["encoder_ready"], late.details["decoder_ready"]) == (False, False, False)


async def test_health_and_metrics_do_not_wait_for_a_dead_control_store(
    backend: ServeBackend, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = Event()
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: answered.wait() and [])
    monkeypatch.setattr("app.cluster.coordinators.ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.01)
    part.hangs = True
    try:
        assert not (await asyncio.wait_for(backend.health(), 60)).ready
        part.metric_families = part.ping
        families = await asyncio.wait_for(backend.metric_families(), 60)
        assert all(family.name.startswith("flux_calibration") for family in families), "this process's own"
    finally:
        answered.set()


class Replica:
    """Stands for the replicas' handle: knows the model, and counts who asks."""

    def __init__(self) -> None:
        self.asked = 0
        self.family = self

    async def remote(self) -> Family:
        self.asked += 1
        return FLUX2_KLEIN


async def test_a_replica_says_once_what_model_is_served(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has checked the checkpoint's files; the API's own node need not have them, nor the decoder tell."""
    replica = Replica()
    backend = ServeBackend(Settings(), part, replica, part)
    monkeypatch.setattr(module, "result_of", lambda response: response)
    assert [await backend.family() for _ in range(3)] == [FLUX2_KLEIN] * 3
    assert replica.asked == 1


class Sources(Part):
    """Encodes prompts and sources into nothing much."""

    async def encode(self, *_: object) -> Any:
        return PromptEmbeddings(torch.zeros(1)) if len(_) == 1 else SourceImage(torch.zeros(2, 64), 16, 32)


class Dying:
    """Stands for the replicas' handle: the first replica dies with its image."""

    def __init__(self) -> None:
        self.jobs: list[DenoiseJob] = []
        self.denoise = self

    async def remote(self, job: DenoiseJob, *_: object) -> Any:
        self.jobs.append(job)
        raise ray.exceptions.ActorDiedError if len(self.jobs) == 1 else BusyError(7)


async def test_an_image_whose_replica_dies_is_asked_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_call, "result_of", lambda response: response)
    part, replica = Sources(), Dying()
    with pytest.raises(BusyError):
        await ServeBackend(Settings(), part, replica, part).generate(edit_job())
    first, second = replica.jobs
    assert first.seed == second.seed
    assert first.row_id != second.row_id


class Taker:
    """Stands for the replicas' handle: takes an image, and refuses the next ones."""

    def __init__(self) -> None:
        self.jobs: list[DenoiseJob] = []
        self.denoise = self.check = self
        self.taken = asyncio.Event()

    async def remote(self, job: DenoiseJob, *_: object) -> Any:
        self.jobs.append(job)
        if len(self.jobs) > 1:
            raise BusyError(7)
        self.taken.set()
        await asyncio.Event().wait()


async def test_pixels_are_dropped_once_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (module, image_call):
        monkeypatch.setattr(place, "result_of", lambda response: response)
    part, replica = Sources(), Taker()
    backend = ServeBackend(Settings(), part, replica, part)
    job = replace(edit_job(), sources=[SourcePixels(np.zeros((16, 32, 3), dtype=np.uint8))])
    pixels = weakref.ref(job.sources[0].pixels)
    waits = asyncio.create_task(backend.generate(job))
    await replica.taken.wait()
    gc.collect()
    assert pixels() is None
    assert replica.jobs[0].source_tokens == 2
    with pytest.raises(BusyError) as refused:
        await backend.check(edit_job())
    assert refused.value.retry_after_s == 7
    assert replica.jobs[1].source_tokens == 0
    waits.cancel()
    await asyncio.wait({waits})


def edit_job() -> ImagesJob:
    return ImagesJob("a", "a circle", None, 1, 32, 16, 1, 3.5, 1.0, 7, MagCacheOptions(), "png", 100)


async def test_images_are_counted_for_calibration_with_their_true_cfg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "result_of", lambda response: response)
    backend = ServeBackend(Settings(), Sources(), Replica(), Sources())
    counted: list[Measurable] = []
    monkeypatch.setattr(backend._demand, "note", lambda kind, images: counted.append(kind))
    plain = edit_job()
    for job in (plain, replace(plain, negative_prompt="", true_cfg_scale=4.0)):
        await asyncio.wait({backend._start(job, None, progress=False).task})
    assert [kind.true_cfg_scale for kind in counted] == [1.0, 4.0]


async def test_an_image_with_an_adapter_is_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "result_of", lambda response: response)
    part, replica = Sources(), Replica()
    sent: list[DenoiseJob] = []

    async def check(job: DenoiseJob) -> None:
        sent.append(job)

    replica.check = replica
    monkeypatch.setattr(replica, "remote", check)
    backend = ServeBackend(Settings(), part, replica, part)
    uses = [(), (LoraUse("a", 1.0, "x"),), (LoraUse("a", 0.5, "x"),), (LoraUse("a", 1.0, "y"),)]
    for loras in uses:
        await backend.check(replace(edit_job(), loras=loras))
    assert [job.loras for job in sent] == uses
    assert len({job.retry_key for job in sent}) == len(uses)
