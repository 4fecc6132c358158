"""Tokens against diffusers' pipelines: packing, position ids, noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline, FluxPipeline

from app.engine.geometry import Geometry
from app.engine.layouts import Flux1Layout, Flux2Layout, Layout, pack, unpack

CPU = torch.device("cpu")


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 96)])
def test_both_pipelines_pack_alike(width: int, height: int) -> None:
    geometry = Geometry.of(width, height)
    latents = torch.randn(2, 16, 2 * geometry.rows, 2 * geometry.columns)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 2 * geometry.rows, 2 * geometry.columns))
    assert torch.equal(packed, Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents)))
    assert torch.equal(unpack(packed, geometry), latents)


def test_flux1_ids_are_those_of_kontext() -> None:
    image, reference = Geometry.of(160, 96), Geometry.of(64, 128)
    ids = Flux1Layout().position_ids(image, 5, [reference])
    expected = [
        FluxKontextPipeline._prepare_latent_image_ids(1, one.rows, one.columns, CPU, torch.float32)
        for one in (image, reference)
    ]
    expected[1][:, 0] = 1
    assert torch.equal(ids, torch.cat([torch.zeros(5, 3), *expected]))
    assert torch.equal(Flux1Layout().position_ids(image, 5), ids[: 5 + image.tokens])


def test_flux2_ids_are_those_of_klein() -> None:
    image, references = Geometry.of(160, 96), [Geometry.of(64, 128), Geometry.of(96, 96)]
    ids = Flux2Layout().position_ids(image, 7, references)
    grids = [torch.empty(1, 1, one.rows, one.columns) for one in (image, *references)]
    expected = torch.cat(
        [
            Flux2KleinPipeline._prepare_text_ids(torch.empty(1, 7, 1))[0],
            Flux2KleinPipeline._prepare_latent_ids(grids[0])[0],
            Flux2KleinPipeline._prepare_image_ids(grids[1:])[0],
        ]
    )
    assert torch.equal(ids, expected.float())


@pytest.mark.parametrize("layout", [Flux1Layout(), Flux2Layout()])
def test_noise_depends_on_the_seed_alone(layout: Layout) -> None:
    geometry = Geometry.of(128, 64)
    first, again, other = (layout.noise(seed, geometry, 64, CPU, torch.float32) for seed in (1, 1, 2))
    assert first.shape == (32, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
