"""FLUX.2-klein behind API keys, a second application of the same Serve: edits, and clients that compete for a place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import httpx
import numpy as np
import openai
import pytest
import torch
from ray import serve

from app.main import build
from app.settings import Settings
from benchmarks.make_checkpoint import make_checkpoint
from tests.cluster.asking import IMAGES, PROMPT, metrics, pixels
from tests.cluster.test_edits_service import OFF, encoded, source
from tests.local_group import TEXT_TOKENS, psnr
from tests.patience import ANSWER_S, wait_for

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789", "carol": "sk-carol-0123456789"}
Clients = dict[str, httpx.Client]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with random weights."""
    return make_checkpoint("flux.2-klein-4b", "tiny", tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def clients(service: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """A client for each key, and one without; one place in the batch, beside the session's application."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()), encoding="utf-8")
    settings = Settings.model_validate(
        {
            "model": str(checkpoint),
            "served_model_name": "klein",
            "cpus_per_rank": 0.1,
            "cpus_per_helper": 0.05,
            "max_batch_rows": 1,
            "sampling": {"num_inference_steps": 4, "max_sequence_length": TEXT_TOKENS},
            "text_encoder": {"placement": "api"},
            "vae": {"placement": "api"},
            "http": {"api_keys_file": str(file)},
        }
    )
    serve.run(build(settings), name="klein", route_prefix="/klein")
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in KEYS.items()} | {"eve": {}}
    made = {
        name: httpx.Client(base_url=f"{service}/klein", headers=own, timeout=ANSWER_S) for name, own in headers.items()
    }
    yield made
    for client in made.values():
        client.close()
    serve.delete("klein")


def ask(client: httpx.Client, n: int = 1, **headers: str) -> int:
    body = {"prompt": PROMPT, "size": "128x128", "num_inference_steps": 100, "n": n}
    return client.post(IMAGES, json=body, headers=headers).status_code


def test_one_client_does_not_starve_the_other(clients: Clients) -> None:
    """The second one's only image goes before most of those that the first one asked for earlier."""
    with ThreadPoolExecutor(9) as pool:
        many = [pool.submit(ask, clients["alice"]) for _ in range(8)]
        wait_for(lambda: metrics(clients["eve"])["flux_waiting_pictures"] >= 6, "most of the first one's images wait")
        assert pool.submit(ask, clients["bob"]).result() == 200
        assert sum(one.done() for one in many) <= 4
        assert [one.result() for one in many] == 8 * [200]
    counted = clients["eve"].get("/metrics").text
    for key, images in (("alice", 8), ("bob", 1)):
        series = rf'flux_key_requests_total{{key="{key}",model="klein",outcome="ok",process="\w+"}} {images}\.0'
        assert re.search(series, counted)
    assert not any(key in counted for key in KEYS.values())


def test_only_the_key_that_made_a_request_cancels_it(clients: Clients) -> None:
    assert ask(clients["eve"]) == 401
    with ThreadPoolExecutor(1) as pool:
        # Several, one after another, so that they are under way for as long as two clients take to ask.
        asked = pool.submit(ask, clients["alice"], n=8, **{"X-Request-Id": "mine"})
        wait_for(lambda: metrics(clients["eve"])["flux_running_pictures"] == 1, "the first image runs")
        assert clients["bob"].delete("/v1/requests/mine").status_code == 403
        assert clients["alice"].delete("/v1/requests/mine").status_code == 200
        assert asked.result() == 409


def test_it_reads_several_images(clients: Clients, checkpoint: Path) -> None:
    images = [source(150, 100), source(64, 90)]
    with openai.OpenAI(base_url=f"{clients['carol'].base_url}v1", api_key=KEYS["carol"], max_retries=0) as client:
        reply = client.images.edit(image=[encoded(one) for one in images], prompt=PROMPT, size="128x96", extra_body=OFF)
        painted = client.images.generate(prompt=PROMPT, size="96x96", extra_body={"seed": 3})
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
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
    assert reply.data is not None
    assert psnr(pixels(reply.data[0]), np.asarray(expected) / 255) >= 55
    assert painted.data is not None
    assert painted.data[0].model_extra is not None
    magcache = painted.data[0].model_extra["magcache"]
    assert magcache["schedule"] == "CCCC"
    assert magcache["uncached_reason"].startswith("FLUX.2-klein is made for 4 steps")
