"""Large latents go from the rank to the decoder by reference, and cost time and no image when they are lost between."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Awaitable
from typing import Any

import pytest
import ray
import torch
from PIL import Image
from ray import serve

from app.api.backend import ImagesJob
from app.cluster.backend import ServeBackend
from app.cluster.by_reference import INLINE_BYTES, by_reference
from app.cluster.handles import DeploymentProxy
from app.cluster.rank import Rank
from app.components.vae import ImageDecoder
from app.errors import UnavailableError
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.results import DenoiseReport, DenoiseResult
from app.settings import Settings
from tests.cluster.actors import Owner
from tests.local_group import job, plans

REPORT = DenoiseReport("C", 1, 0, 0.0, None, 0.0, 0.0)


def test_only_large_values_go_by_reference(cluster: None) -> None:
    small, large = torch.zeros(INLINE_BYTES // 4), torch.zeros(INLINE_BYTES // 4 + 1)
    assert by_reference(small) is small
    reference = by_reference(large)
    assert isinstance(reference, ray.ObjectRef)
    assert isinstance(reference, Awaitable), "the decoder knows it by this"
    assert torch.equal(ray.get(reference), large)


def test_a_rank_answers_with_references(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(Settings(threads_per_rank=1), 0)
    rank.load(None)
    formed = plans([job("a/0", steps=4, partial_images=1)])
    tensors = Conditioning(PromptEmbeddings(torch.zeros(32, 128), torch.zeros(128)))
    inline = rank.execute(formed, tensors)
    monkeypatch.setattr("app.cluster.by_reference.INLINE_BYTES", 0)
    again = Rank(Settings(threads_per_rank=1), 0)
    again.load(None)
    referred = again.execute(formed, tensors)
    for kind in ("latents", "previews"):
        values = [value for result in inline for value in getattr(result, kind).values()]
        references = [value for result in referred for value in getattr(result, kind).values()]
        assert len(values) == 1
        assert all(isinstance(reference, ray.ObjectRef) for reference in references)
        assert all(map(torch.equal, values, ray.get(references)))


class Encoder:
    """Stands for the prompt encoder."""

    async def encode(self, prompt: str) -> PromptEmbeddings:
        return PromptEmbeddings(torch.zeros(1, 1))


async def until_lost(reference: ray.ObjectRef) -> None:
    """Wait until the owner's death is known; at first its object is still there."""
    for _ in range(600):
        try:
            await reference
        except ray.exceptions.OwnerDiedError:
            return
        await asyncio.sleep(0.1)
    pytest.fail("the object outlives its owner")


class Replica:
    """Stands for the replicas' handle; the first ``losses`` images' rank is killed before they are decoded."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.jobs: list[DenoiseJob] = []
        self.owners: list[Any] = []
        self.denoise = self

    async def remote(self, asked: DenoiseJob, _: Conditioning) -> DenoiseResult:
        self.jobs.append(asked)
        self.owners.append(Owner.remote())
        (latents,) = await self.owners[-1].make.remote()
        if len(self.jobs) <= self.losses:
            os.kill(await self.owners[-1].pid.remote(), signal.SIGKILL)
            await until_lost(latents)
        return DenoiseResult(latents, REPORT)


@pytest.fixture(scope="module", params=["in the API", "own deployment"])
def decoder(request: pytest.FixtureRequest, service: str) -> Any:
    if request.param == "in the API":
        yield ImageDecoder(Settings())
        return
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0})(ImageDecoder)
    yield DeploymentProxy(serve.run(deployment.bind(Settings()), name="decoder", route_prefix=None))
    serve.delete("decoder")


def images_job() -> ImagesJob:
    return ImagesJob("a", "a red circle", None, 1, 128, 128, 1, 3.5, 1.0, 7, MagCacheOptions(), "png", 100)


async def test_an_image_whose_rank_dies_before_it_is_decoded_is_made_again(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cluster.image_call.result_of", lambda response: response)
    replica = Replica(losses=1)
    (image,) = await ServeBackend(Settings(), Encoder(), replica, decoder).generate(images_job())
    assert Image.open(io.BytesIO(image.data)).size == (128, 128)
    assert [one.seed for one in replica.jobs] == [7, 7]
    assert replica.jobs[0].row_id != replica.jobs[1].row_id, "the first one is over, and its news too"


async def test_an_image_that_is_lost_each_time_is_given_up(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cluster.image_call.result_of", lambda response: response)
    backend = ServeBackend(Settings(rebuild_attempts=1), Encoder(), Replica(losses=9), decoder)
    with pytest.raises(UnavailableError, match="ask again"):
        await backend.generate(images_job())
