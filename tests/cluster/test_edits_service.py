"""Edits end to end: a multipart form in, the image of diffusers' own pipeline out, for each way to use a source."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image
from ray import serve

from app.components.source_encoder import SourceEncoder
from app.engine.families import FLUX_DEV
from app.engine.geometry import Geometry
from app.engine.layouts import unpack
from app.main import build
from app.settings import Settings
from benchmarks.make_checkpoint import make_checkpoint
from tests.local_group import TEXT_TOKENS, psnr

PROMPT = "a green circle on a blue background"
OFF = {"seed": 7, "magcache": {"enabled": False}}
Serving = Callable[[str], tuple[openai.OpenAI, Path]]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(reply: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json)))) / 255


def source(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (35, 70, 225))
    image.paste((220, 40, 40), (width // 4, height // 4, width // 2, height // 2))
    return image


@pytest.fixture
def serving(service: str, tmp_path: Path) -> Iterator[Serving]:
    """Serve a tiny checkpoint beside the session's application, which leaves a quarter of a CPU."""
    names: list[str] = []

    def start(model: str) -> tuple[openai.OpenAI, Path]:
        folder = make_checkpoint(model, "tiny", tmp_path / model)
        settings = Settings.model_validate(
            {
                "model": str(folder),
                "served_model_name": "tiny",
                "cpus_per_rank": 0.1,
                "cpus_per_helper": 0.05,
                "sampling": {"num_inference_steps": 4, "max_sequence_length": TEXT_TOKENS},
            }
        )
        name = model.replace(".", "-")
        names.append(name)
        serve.run(build(settings), name=name, route_prefix=f"/{name}")
        client = openai.OpenAI(base_url=f"{service}/{name}/v1", api_key="unused", max_retries=0, timeout=120)
        return client, folder

    yield start
    for name in names:
        serve.delete(name)


def load(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    assert psnr(pixels(reply), np.asarray(expected) / 255) >= 55


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


def test_klein_reads_several_images(serving: Serving) -> None:
    client, folder = serving("flux.2-klein-4b")
    images = [source(150, 100), source(64, 90)]
    reply = client.images.edit(image=[encoded(one) for one in images], prompt=PROMPT, size="128x96", extra_body=OFF)
    pipeline = load(folder)
    expected = pipeline(
        image=images,
        prompt=PROMPT,
        width=128,
        height=96,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    assert psnr(pixels(reply), np.asarray(expected) / 255) >= 55
    painted = client.images.generate(prompt=PROMPT, size="96x96", extra_body={"seed": 3})
    assert painted.data is not None
    assert painted.data[0].model_extra is not None
    magcache = painted.data[0].model_extra["magcache"]
    assert magcache["schedule"] == "CCCC"
    assert magcache["uncached_reason"].startswith("FLUX.2-klein is made for 4 steps")
