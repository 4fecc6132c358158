"""Inpainting end to end: an image and a mask in, the image of diffusers' own pipeline out, on two ranks."""

from __future__ import annotations

import io

import httpx
import numpy as np
import openai
import torch
from diffusers import FluxInpaintPipeline, FluxPipeline
from PIL import Image

from app.components.source_encoder import SourceEncoder
from app.engine.families import FLUX_DEV
from app.engine.geometry import Geometry
from app.engine.layouts import unpack
from tests.cluster.asking import pixels
from tests.local_group import TEXT_TOKENS, psnr

PROMPT = "a green circle on a blue background"
OFF = {"seed": 7, "magcache": {"enabled": False}}
HOLE = (16, 16, 112, 112)
# Around the hole, but for the image's edge, where flux-tiny's VAE depends on the whole image.
OUTSIDE = np.zeros((128, 128), dtype=bool)
OUTSIDE[4:124, 4:124] = True
OUTSIDE[8:120, 8:120] = False


def source() -> Image.Image:
    """A red square on blue."""
    image = Image.new("RGB", (128, 128), (35, 70, 225))
    image.paste((220, 40, 40), (40, 40, 88, 88))
    return image


def white() -> Image.Image:
    """The hole as a drawn mask."""
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, HOLE)
    return mask


def transparent() -> Image.Image:
    """The image with a hole, as OpenAI's masks come."""
    image = source().convert("RGBA")
    image.paste((0, 0, 0, 0), HOLE)
    return image


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_both_kinds_of_mask_make_the_pipelines_image(client: openai.OpenAI, pipeline: FluxPipeline) -> None:
    made = [
        client.images.edit(
            image=encoded(source()),
            mask=("mask.png", encoded(mask)),
            prompt=PROMPT,
            size="128x128",
            extra_body={**OFF, "num_inference_steps": 10, "strength": 0.8},
        )
        for mask in (transparent(), white())
    ]
    # The service takes the posterior's mode where the pipeline draws from it, so the pipeline is given the latents.
    tokens = SourceEncoder(pipeline.vae, FLUX_DEV).encode(np.asarray(source()), 128, 128).latents
    latents = unpack(tokens[None], Geometry.of(128, 128))
    expected = FluxInpaintPipeline(**pipeline.components)(
        PROMPT,
        image=latents,
        mask_image=white(),
        masked_image_latents=latents,
        width=128,
        height=128,
        num_inference_steps=10,
        strength=0.8,
        guidance_scale=3.5,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    for reply in made:
        assert psnr(pixels(reply.data[0]), np.asarray(expected) / 255) >= 55


def test_with_the_cache_and_previews_the_outside_stays(client: openai.OpenAI) -> None:
    """With the default settings: all of the schedule runs, reuses, and every preview shows the source around."""
    before = np.asarray(source()) / 255
    events = list(
        client.images.edit(
            image=encoded(source()),
            mask=encoded(white()),
            prompt=PROMPT,
            size="128x128",
            stream=True,
            partial_images=3,
            extra_body={"seed": 7},
        )
    )
    assert [event.type for event in events] == [*3 * ["image_edit.partial_image"], "image_edit.completed"]
    schedule = events[-1].magcache["schedule"]
    assert (len(schedule), "." in schedule) == (28, True)
    for event in events:
        assert psnr(pixels(event)[OUTSIDE], before[OUTSIDE]) >= 30
    middle = pixels(events[-1])[64, 64]
    assert middle[1] > 0.5 > middle[0], "the hole is painted"


def test_the_images_own_hole_is_painted(http: httpx.Client) -> None:
    assert http.get("/v1/models/flux-tiny").json()["capabilities"]["mask"]
    form = {"prompt": PROMPT, "seed": "7", "size": "128x128"}
    reply = http.post("/v1/images/edits", data=form, files={"image": encoded(transparent())})
    assert reply.status_code == 200, reply.text
    assert reply.json()["warnings"] == []
    made, before = pixels(reply.json()["data"][0]), np.asarray(source()) / 255
    assert psnr(made[OUTSIDE], before[OUTSIDE]) >= 30
    assert made[64, 64][1] > 0.5 > made[64, 64][0]
