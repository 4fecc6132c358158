"""The decoder's order, with flux-tiny's VAE."""

from __future__ import annotations

import asyncio
import io
import threading

import pytest
import torch
from PIL import Image

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
