"""Adapters through the running service: from the folder to the image."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.cluster.asking import IMAGES, PROMPT, ask, metrics, pixels
from tests.cluster.conftest import ADAPTER
from tests.lora_files import write_lora

LEVEL = 1 / 255
STEPS = {"num_inference_steps": 10, "magcache": {"computed_steps": 5}}


def with_lora(name: str = ADAPTER, scale: float = 1.0) -> dict[str, Any]:
    return {"lora": [{"name": name, "scale": scale}]}


def image_of(http: httpx.Client, **body: Any) -> np.ndarray:
    return pixels(ask(http, **STEPS, **body)["data"][0])


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Within one of 256 levels."""
    return bool(np.abs(first - second).max() <= LEVEL * 1.001)


@pytest.fixture
def added(http: httpx.Client, lora_dir: Path) -> Iterator[Path]:
    """The folder of adapters, which is as before after the test."""
    before = set(lora_dir.iterdir())
    yield lora_dir
    for path in set(lora_dir.iterdir()) - before:
        path.unlink()
    assert http.post("/v1/loras/reload").status_code == 200


def test_an_adapter_changes_its_own_images_only(http: httpx.Client) -> None:
    bodies = [{}, with_lora(), with_lora(scale=-1.0), with_lora(scale=0.0), {"size": "160x96"}]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: image_of(http, **body), bodies))
    alone = [image_of(http, **body) for body in bodies]
    for first, second in zip(together, alone, strict=True):
        assert same(first, second)
    plain, adapted, negative, zero, _ = together
    assert same(plain, zero)
    assert not same(plain, adapted)
    assert not same(plain, negative)
    assert not same(adapted, negative)


def test_what_a_reply_says_of_it(http: httpx.Client) -> None:
    reply = http.post(IMAGES, json={"prompt": PROMPT, "seed": 7, "metadata": True, **STEPS, **with_lora(scale=0.5)})
    (card,) = (one for one in http.get("/v1/loras").json()["data"] if one["id"] == ADAPTER)
    image = reply.json()["data"][0]
    assert image["lora"] == [{"name": ADAPTER, "scale": 0.5, "digest": card["digest"]}]
    text = Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).info["parameters"]
    assert f'Lora: "{ADAPTER}: 0.5"' in text
    assert card["digest"][:12] in text
    counted = metrics(http)
    assert counted["flux_lora_requests_total"] >= 1
    assert counted["flux_lora_bytes"] == card["bytes"]


def test_an_unknown_one_is_a_404_with_the_nearest(http: httpx.Client) -> None:
    reply = http.post(IMAGES, json={"prompt": PROMPT, **with_lora(ADAPTER[:-1])})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "lora_not_found")
    assert f"did you mean {ADAPTER!r}?" in reply.json()["error"]["message"]


def test_a_reload_finds_new_files_and_says_what_is_refused(http: httpx.Client, added: Path) -> None:
    write_lora(added / "new.safetensors", fill=0.2)
    (added / "broken.safetensors").write_bytes(b"\0" * 64)
    assert http.post(IMAGES, json={"prompt": PROMPT, **with_lora("new")}).status_code == 404
    listing = http.post("/v1/loras/reload").json()
    assert {card["id"] for card in listing["data"]} == {ADAPTER, "new"}
    assert [one["id"] for one in listing["refused"]] == ["broken"]
    assert not same(image_of(http), image_of(http, **with_lora("new")))
    refused = http.post(IMAGES, json={"prompt": PROMPT, **with_lora("broken")})
    assert (refused.status_code, refused.json()["error"]["message"].count("cannot be used")) == (404, 1)


def test_a_file_that_cannot_be_loaded_fails_its_request_only(http: httpx.Client, added: Path) -> None:
    rebuilds = metrics(http)["flux_group_rebuilds_total"]
    write_lora(added / "infinite.safetensors", fill=float("inf"))  # which no header shows
    write_lora(added / "swapped.safetensors", fill=0.1)
    http.post("/v1/loras/reload")
    write_lora(added / "swapped.safetensors", fill=0.2)
    for name, words in (("infinite", "finite"), ("swapped", "replaced")):
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(image_of, http)
            failed = http.post(IMAGES, json={"prompt": PROMPT, "seed": 7, **STEPS, **with_lora(name)})
        assert (failed.status_code, failed.json()["error"]["code"]) == (409, "lora_unusable"), failed.text
        assert words in failed.json()["error"]["message"]
        assert same(beside.result(), image_of(http))
    http.post("/v1/loras/reload")
    image_of(http, **with_lora("swapped"))
    assert metrics(http)["flux_group_rebuilds_total"] == rebuilds
