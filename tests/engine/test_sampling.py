from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from app.engine.sampling import FlowMatchSampler, Geometry, initial_noise, pack, position_ids, unpack
from tests.local_group import MODEL


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 96), (64, 256)])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_sigmas_are_those_of_the_pipeline(pipeline: FluxPipeline, width: int, height: int, steps: int) -> None:
    pipeline(
        "", width=width, height=height, num_inference_steps=steps, max_sequence_length=32, output_type="latent",
        callback_on_step_end=_stop_after_first,
    )  # fmt: skip
    pipeline._interrupt = False
    ours = FlowMatchSampler(MODEL).sigmas(steps, Geometry.of(width, height).tokens)
    torch.testing.assert_close(ours, pipeline.scheduler.sigmas, rtol=0, atol=0)


def _stop_after_first(pipeline: FluxPipeline, *_: object) -> dict[str, object]:
    pipeline._interrupt = True
    return {}


def test_packing_is_that_of_the_pipeline() -> None:
    geometry = Geometry.of(160, 96)
    latents = torch.randn(2, 16, 2 * geometry.rows, 2 * geometry.columns)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 2 * geometry.rows, 2 * geometry.columns))
    assert torch.equal(unpack(packed, geometry), latents)


def test_position_ids_are_those_of_the_pipeline() -> None:
    geometry = Geometry.of(160, 96)
    image = FluxPipeline._prepare_latent_image_ids(1, geometry.rows, geometry.columns, "cpu", torch.float32)
    ids = position_ids(geometry, 5)
    assert torch.equal(ids[5:], image)
    assert not ids[:5].any()


def test_noise_depends_on_the_seed_alone() -> None:
    geometry = Geometry.of(128, 128)
    first, again, other = (initial_noise(seed, geometry, 64, torch.device("cpu"), torch.float32) for seed in (1, 1, 2))
    assert first.shape == (64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
