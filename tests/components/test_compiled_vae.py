"""The compiled decoder: the same images, and nothing left to compile once it is up, whatever the size or tiling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from app.components.compiled_vae import _other, compile_decoder
from benchmarks.checkpoints.geometry import repository
from benchmarks.gpu_runs import random_model

TILE = 16
"""Latents of a tile's side; tiles begin every 12 latents, so that an image's last ones are smaller."""
USUAL = 128
"""In pixels: FLUX.1 has as many latents a side then as they have channels."""
SIZES = [(128, 128), (64, 64), (16, 48), (96, 160), (256, 272)]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # A CPU has other kernels for small convolutions, each with code of its own; a GPU has not.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):  # type: ignore[no-untyped-call]
        yield
    torch._dynamo.reset()


def vae(model: str, tiling: bool) -> Any:
    made = random_model(repository(model, "tiny").parts["vae"], torch.device("cpu"), torch.float32)
    made.to(memory_format=torch.channels_last)
    if tiling:
        made.enable_tiling()
        made.tile_latent_min_size, made.tile_sample_min_size = TILE, 8 * TILE
    return made


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("model", "tiling"), [("flux.1-dev", True), ("flux.2-klein-4b", False)])
def test_images_are_the_same_and_none_waits_for_the_compiler(model: str, tiling: bool) -> None:
    plain, compiled = vae(model, tiling), vae(model, tiling)
    # Graphs are made, and run operator by operator: a compiler's own code rounds otherwise, and takes a minute.
    compile_decoder(compiled, USUAL, USUAL, compiler="eager")
    assert counters["stats"]["unique_graphs"] == 2, "the usual size and all others"
    with torch.inference_mode():
        for width, height in SIZES:
            latents = torch.randn(1, plain.config.latent_channels, height // 8, width // 8)
            expected, made = (one.decode(latents, return_dict=False)[0] for one in (plain, compiled))
            assert torch.equal(expected, made), (width, height)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize(("rows", "columns", "channels"), [(128, 128, 16), (12, 8, 16), (12, 12, 16), (128, 128, 132)])
def test_what_all_other_sizes_are_compiled_for_has_no_equal_sides(rows: int, columns: int, channels: int) -> None:
    sides = _other(rows, columns, channels)
    assert len({*sides, channels}) == 3
    assert (rows, columns) != sides
