"""A group that hangs is rebuilt under load; one that cannot be rebuilt says why, to clients and in /health."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from app.main import build
from app.settings import Settings
from tests.cluster.test_service import PROMPT, metrics, pixels, wait_for
from tests.local_group import MODEL, psnr

pytestmark = pytest.mark.faults

IMAGES = "v1/images/generations"
LONG = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 100, "magcache": {"enabled": False}, "n": 2}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Served:
    """An application of its own beside the one that all tests share."""

    http: httpx.Client
    model: Path
    others: frozenset[int]

    @property
    def ranks(self) -> list[psutil.Process]:
        return [each for each in _ranks() if each.pid not in self.others]


def _ranks() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [each for each in children if "".join(each.cmdline()).startswith("ray::Rank")]


@pytest.fixture(scope="module")
def served(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tmp_path_factory.mktemp("hanging") / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.png", "*.md"))
    settings = Settings.model_validate(
        {
            "model": str(model),
            "tensor_parallel_size": 2,
            "threads_per_rank": 1,
            "cpus_per_rank": 0.05,
            "cpus_per_helper": 0.02,
            "hang_timeout_s": 5.0,
            "rebuild_attempts": 1,
            "magcache": {"profile": "flux-tiny"},
            "text_encoder": {"placement": "api"},
            "vae": {"placement": "api"},
        }
    )
    others = frozenset(each.pid for each in _ranks())
    serve.run(build(settings), name="hanging", route_prefix="/hanging")
    with httpx.Client(base_url=f"{service}/hanging", timeout=120) as http:
        yield Served(http, model, others)
    serve.delete("hanging")


def _ask(served: Served) -> list[dict[str, Any]]:
    reply = served.http.post(IMAGES, json=LONG)
    assert reply.status_code == 200, reply.text
    images: list[dict[str, Any]] = reply.json()["data"]
    return images


def test_a_rank_that_stops_in_the_middle_of_images_is_replaced_and_they_are_made_again(served: Served) -> None:
    undisturbed = _ask(served)
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(_ask, served)
        wait_for(lambda: metrics(served.http)["flux_running_pictures"] == 2, "both images run")
        stopped = served.ranks[1]
        stopped.send_signal(signal.SIGSTOP)
        assert not disturbed.done()
        images = disturbed.result()
    for first, second in zip(images, undisturbed, strict=True):
        assert psnr(pixels(first), pixels(second)) >= 55
    wait_for(lambda: not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, "the stopped rank is killed")


# Last, since the group is gone afterwards.
def test_a_group_that_cannot_be_rebuilt_says_why(served: Served) -> None:
    weights = served.model / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    served.ranks[0].kill()
    reply = served.http.post(IMAGES, json=LONG)
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert error["message"].startswith("the tensor-parallel group cannot be rebuilt: CheckpointError: ")
    assert WEIGHTS in error["message"]
    assert int(reply.headers["retry-after"]) >= 1
    health = served.http.get("health").json()
    assert any("cannot be rebuilt: CheckpointError" in trouble for trouble in health["details"]["troubles"])
    for text in (reply.text, json.dumps(health)):
        assert not any(word in text for word in ("pid", "ip=", "actor", "ray::", "Traceback"))
