"""Edits end to end: a multipart form in, the image of diffusers' own pipeline out, for each way to use a source."""

from __future__ import annotations

import io

import httpx
import numpy as np
import openai
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from app.components.source_encoder import SourceEncoder
from app.engine.families import FLUX_DEV
from app.engine.geometry import Geometry
from app.engine.layouts import unpack
from tests.cluster.asking import pixels
from tests.local_group import TEXT_TOKENS, psnr

PROMPT = "a green circle on a blue background"
OFF = {"seed": 7, "magcache": {"enabled": False}}


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def source(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (35, 70, 225))
    image.paste((220, 40, 40), (width // 4, height // 4, width // 2, height // 2))
    return image


def test_flux_starts_from_the_image(client: openai.OpenAI, pipeline: FluxPipeline) -> None:
    reply = client.images.edit(
        image=encoded(source(160, 96)),
        prompt=PROMPT,
        size="128x128",
        extra_body={**OFF, "num_inference_steps": 10, "strength": 0.7},
    )
    assert reply.data is not None
    assert reply.data[0].model_extra is not None
    assert reply.data[0].model_extra["magcache"]["schedule"] == 7 * "C"
    # The service takes the posterior's mode where the pipeline draws from it, so the pipeline is given the latents.
    tokens = SourceEncoder(pipeline.vae, FLUX_DEV).encode(np.asarray(source(160, 96)), 128, 128).latents
    expected = FluxImg2ImgPipeline(**pipeline.components)(
        PROMPT,
        image=unpack(tokens[None], Geometry.of(128, 128)),
        width=128,
        height=128,
        num_inference_steps=10,
        strength=0.7,
        guidance_scale=3.5,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    assert psnr(pixels(reply.data[0]), np.asarray(expected) / 255) >= 55


def test_flux_reuses_in_what_is_left_of_the_schedule(http: httpx.Client) -> None:
    form = {"prompt": PROMPT, "seed": "7", "strength": "0.75"}
    reply = http.post("/v1/images/edits", data=form, files={"image": encoded(source(128, 128))})
    assert reply.status_code == 200, reply.text
    schedule = reply.json()["data"][0]["magcache"]["schedule"]
    assert len(schedule) == 21
    assert schedule.startswith("C")
    assert "." in schedule


def test_what_cannot_be_made_in_time_is_refused_before_its_image_is_decoded(http: httpx.Client) -> None:
    cut = encoded(source(512, 512))[:-40]
    form = {"prompt": PROMPT, "deadline_s": "0.001"}
    reply = http.post("/v1/images/edits", data=form, files={"image": cut})
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "deadline_impossible")
    reply = http.post("/v1/images/edits", data={"prompt": PROMPT}, files={"image": cut})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")
