"""The quality guard with the running service's groups, an encoder and a decoder of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ray import serve

from app.api.backend import GeneratedImage, ImagesJob
from app.cluster.backend import ServeBackend
from app.cluster.quality_guard import MOST_WAITING, GuardedImages, uncached
from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.control.admission import default_job
from app.messages.calibration import CalibrationRun
from app.messages.jobs import MagCacheOptions
from app.messages.results import DenoiseReport, DenoiseResult
from app.settings import QualityGuardSettings, Settings
from tests.cluster.conftest import settings_of
from tests.local_group import random_conditioning

UNREACHABLE = QualityGuardSettings(target_psnr_db=99.0, share=1.0, max_computed_share=0.9)
CONDITIONING = random_conditioning()


@pytest.fixture
def settings() -> Settings:
    return settings_of("flux-tiny.yaml").model_copy(update={"quality_guard": UNREACHABLE})


@pytest.fixture
async def backend(service: str, settings: Settings) -> AsyncIterator[ServeBackend]:
    replica = serve.get_deployment_handle("FluxReplica", "flux")
    made = ServeBackend(settings, PromptEncoder(settings), replica, ImageDecoder(settings))
    yield made
    await made.stop_background()


def asked(settings: Settings, number: int, **fields: Any) -> ImagesJob:
    options = default_job(settings).magcache
    values = {"prompt": "a red circle", "negative_prompt": None, "n": 1, "width": 64, "height": 64}
    values |= {"num_inference_steps": 12, "guidance_scale": 3.5, "true_cfg_scale": 1.0, "seed": number}
    values |= {"magcache": options, "output_format": "png", "output_compression": 100, **fields}
    return ImagesJob(request_id=f"guarded-{number}", **values)


async def compared(backend: ServeBackend, images: int) -> dict[str, float]:
    """The guard's metrics once so many images are compared, summed over labels other than ``result``."""
    async with asyncio.timeout(60):
        while True:
            totals: dict[str, float] = {}
            for family in await backend.metric_families():
                for sample in family.samples:
                    name = ":".join([sample.name, *filter(None, [sample.labels.get("result")])])
                    totals[name] = totals.get(name, 0.0) + sample.value
            if totals["flux_guard_samples_total:compared"] >= images:
                return totals
            await asyncio.sleep(0.05)


async def test_images_below_the_target_raise_the_budget_of_those_to_come(
    backend: ServeBackend, settings: Settings
) -> None:
    async def make(number: int, **fields: Any) -> GeneratedImage:
        (image,) = await backend.generate(asked(settings, number, **fields))
        return image

    first = [await make(number) for number in range(2)]
    metrics = await compared(backend, 2)
    before = first[0].report.computed
    assert metrics["flux_guard_budget_steps"] == before + 1
    guided = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
    with_guidance = (await make(5, **guided)).report.computed
    assert 20.0 < metrics["flux_guard_psnr_db_sum"] / 2 < 99.0
    assert 0.5 < metrics["flux_guard_ssim_sum"] / 2 < 1.0
    assert (await make(2)).report.computed == before + 1
    assert (await make(3, **guided)).report.computed == with_guidance, "a kind of its own"
    own = replace(default_job(settings).magcache, computed_steps=before - 1, client_chose=True)
    assert (await make(4, magcache=own)).report.computed == before - 1
    metrics = await compared(backend, 5)
    assert (metrics["flux_guard_samples_total:compared"], metrics["flux_guard_samples_total:failed"]) == (5, 0)


REPORT = DenoiseReport("C.C.", 2, 2, 0.5, None, 0.0, 1.0, profile="flux-tiny@0123456789ab")


def sampled(settings: Settings, images: int, report: DenoiseReport = REPORT, **fields: Any) -> tuple[int, int]:
    """How many of so many finished images wait to be compared, and how many gave way to newer ones."""
    guard = GuardedImages(settings, 99.0, None, None)
    job = replace(default_job(settings), **fields)
    for _ in range(images):
        guard.finished(job, CONDITIONING, DenoiseResult(torch.zeros(64, 64), report))
    dropped = [
        sample.value
        for family in guard.metric_families()
        for sample in family.samples
        if sample.labels.get("result") == "dropped" and sample.name.endswith("_total")
    ]
    guard.stop()
    return guard._waiting.qsize(), int(dropped[0])


async def test_samples_that_wait_are_bounded(settings: Settings) -> None:
    assert sampled(settings, MOST_WAITING + 3) == (MOST_WAITING, 3)


async def test_a_share_of_the_images_is_sampled(settings: Settings) -> None:
    quarter = settings.model_copy(update={"quality_guard": QualityGuardSettings(target_psnr_db=30.0, share=0.25)})
    assert 400 < sum(sampled(quarter, 2000)) < 600


@pytest.mark.parametrize(
    ("report", "fields"),
    [
        (replace(REPORT, lowered_by="load"), {}),
        (replace(REPORT, skipped=0), {}),
        (replace(REPORT, profile=None), {}),
        (REPORT, {"strength": 0.5}),
        (REPORT, {"magcache": MagCacheOptions(computed_share=0.25, client_chose=True)}),
        (REPORT, {"magcache": MagCacheOptions(mag_max_skip_steps=2)}),
    ],
)
async def test_an_image_whose_schedule_is_not_the_guards_is_left(
    settings: Settings, report: DenoiseReport, fields: dict[str, Any]
) -> None:
    assert sampled(settings, 1, report, **fields) == (0, 0)


def test_the_uncached_row_is_in_the_background_and_of_no_client(settings: Settings) -> None:
    job = replace(default_job(settings), key_name="alice", deadline_s=1.0, partial_images=2, request_id="hers", index=3)
    row = uncached(job)
    assert row.calibration == CalibrationRun("C" * 28)
    assert (row.key_name, row.deadline_s, row.partial_images, row.index) == ("", None, 0, 0)
    assert row.request_id.startswith("guard-")
    assert (row.seed, row.width, row.guidance_scale) == (job.seed, job.width, job.guidance_scale)


def test_off_is_the_default(settings: Settings) -> None:
    backend = ServeBackend(settings.model_copy(update={"quality_guard": QualityGuardSettings()}), None, None, None)
    assert backend._guard is None
