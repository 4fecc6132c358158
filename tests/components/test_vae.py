"""The decoder's order, with flux-tiny's VAE."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from app.components import vae
from app.components.compiled_vae import compile_decoder
from app.components.vae import ImageDecoder
from app.engine.geometry import Geometry
from app.errors import GenerationError
from app.settings import Settings

FORM = (128, 96, "png", 100)


async def test_finished_images_go_before_previews_and_previews_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ImageDecoder(Settings())
    random = torch.randn(8 * 6, 64, generator=torch.Generator().manual_seed(0))
    latents = {name: random.clone() for name in "ApqrB"}
    decode, decoded = decoder._decode, []

    def recorded(tensor: torch.Tensor, geometry: Geometry) -> Image.Image:
        decoded.extend(name for name, one in latents.items() if one is tensor)
        return decode(tensor, geometry)

    monkeypatch.setattr(decoder, "_decode", recorded)
    busy = threading.Event()
    decoder._thread.submit(busy.wait)
    tasks = []
    for name, call in (("A", "decode"), ("p", "preview"), ("q", "preview"), ("r", "preview"), ("B", "decode")):
        tasks.append(asyncio.create_task(getattr(decoder, call)(latents[name], *FORM)))
        await asyncio.sleep(0)
    tasks[3].cancel()  # its image is there: it is left out
    busy.set()
    await asyncio.wait(tasks, timeout=60)
    assert decoded == ["A", "B", "p", "q"]
    assert tasks[3].cancelled()
    assert Image.open(io.BytesIO(tasks[0].result())).size == (128, 96)
    # A preview of the finished latents is the finished image.
    assert tasks[1].result() == tasks[0].result()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_latents_that_are_not_finite_are_an_error_and_no_black_image(value: float) -> None:
    latents = torch.zeros(8 * 6, 64)
    latents[3, 5] = value
    with pytest.raises(GenerationError, match="not finite") as caught:
        await ImageDecoder(Settings()).decode(latents, *FORM)
    assert (caught.value.status, caught.value.code) == (500, "generation_failed")


async def test_a_compiled_decoder_is_up_when_all_of_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(vae, "compile_decoder", partial(compile_decoder, compiler="eager"))
    torch._dynamo.reset()
    for compiled in (False, True):
        # A CPU's decoder is not compiled in service.
        monkeypatch.setattr(Settings, "decoder_is_compiled", compiled)
        counters.clear()
        decoder = ImageDecoder(Settings(compile_cache_dir=str(tmp_path)))
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (2 if compiled else 0), "the default size and all others"
        latents = torch.randn(8 * 8, 64, generator=torch.Generator().manual_seed(0))
        images.append(await decoder.decode(latents, 128, 128, "png", 100))
        assert counters["stats"]["unique_graphs"] == graphs, "its thread compiles nothing anew"
    assert images[0] == images[1]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "vae")
    torch._dynamo.reset()
