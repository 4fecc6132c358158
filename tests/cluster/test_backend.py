"""The API's backend without a cluster: what it makes of the other parts' answers."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from threading import Event
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch
from ray.serve.handle import DeploymentHandle

from app.api.backend import ImagesJob, SourcePixels
from app.cluster import backend as module
from app.cluster import image_call
from app.cluster.api_processes import ApiProcesses
from app.cluster.backend import ServeBackend
from app.cluster.coordinators import Coordinators
from app.cluster.handles import DeploymentProxy
from app.control.demand import Measurable
from app.engine.families import FLUX2_KLEIN, Family
from app.errors import BusyError, RequestCancelledError, UnavailableError
from app.messages.conditioning import PromptEmbeddings, SourceImage
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.loras import LoraUse
from app.settings import Settings


class Part:
    """Stands for the encoder or the decoder."""

    async def ping(self) -> None:
        await asyncio.Event().wait()


class Silent:
    """Stands for a handle whose deployment does not answer."""

    def broadcast(self, method: str) -> Silent:
        return self

    async def results_async(self, return_exceptions: bool) -> list[object]:
        await asyncio.Event().wait()
        return []


class Encoder(Part, DeploymentProxy):
    """Stands for an encoder in processes of its own, which do not answer."""


class Replicas:
    """Stands for the replicas' handle, which answer to no broadcast."""

    def broadcast(self, method: str) -> Replicas:
        assert method == "trouble"
        return self

    async def results_async(self, return_exceptions: bool) -> list[object]:
        return [ray.exceptions.ActorDiedError()]


async def test_health_and_metrics_do_not_wait_for_a_dead_control_store(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ServeBackend(Settings(), Encoder(cast("DeploymentHandle", Silent())), Replicas(), Part())
    answered = Event()
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: answered.wait() and [])
    for place in ("handles", "health", "coordinators"):
        monkeypatch.setattr(f"app.cluster.{place}.ANSWER_SECONDS", 0.01)
    try:
        assert not (await asyncio.wait_for(backend.health(), 60)).ready
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


async def test_a_replica_says_once_what_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has checked the checkpoint's files; the API's own node need not have them, nor the decoder tell."""
    part, replica = Part(), Replica()
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


class ApisOfWhichOneHangs(ApiProcesses):
    """Two processes: what they are asked together has no answer."""

    is_alone = False

    async def ask(self, method: str, *args: object) -> list[Any]:
        return []


class CoordinatorWithoutRequests(Coordinators):
    """One that has nothing to cancel."""

    async def call(self, method: str, *args: object) -> list[Any]:
        return [(0, 0)]


async def test_a_request_that_may_be_under_way_is_not_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    part, replica, coordinators = Sources(), Taker(), CoordinatorWithoutRequests()
    assert await ServeBackend(Settings(), part, replica, part, None, coordinators).cancel("unknown") == 0
    monkeypatch.setattr(image_call, "result_of", lambda response: response)
    backend = ServeBackend(Settings(), part, replica, part, ApisOfWhichOneHangs(), coordinators)
    with pytest.raises(UnavailableError, match="does not answer"):
        await backend.cancel("unknown")
    waits = asyncio.create_task(backend.generate(edit_job()))
    await replica.taken.wait()
    assert await backend.cancel(edit_job().request_id) == 1, "its own it ends in any case"
    with pytest.raises(RequestCancelledError):
        await waits


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
