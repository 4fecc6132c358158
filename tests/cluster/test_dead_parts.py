"""Processes that die in the middle of a request cost no image; a spare group takes the place of one that broke."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest
from ray import serve

from app.main import build
from app.settings import Settings
from tests.cluster.asking import ask, metrics, pixels, wait_for
from tests.cluster.conftest import settings_of
from tests.local_group import psnr

pytestmark = pytest.mark.faults

LONG = {"num_inference_steps": 100, "magcache": {"enabled": False}}


@dataclass(frozen=True)
class Apart:
    """An application with all parts in processes of their own and a spare group, beside the one that all tests share.

    Attributes:
        others: processes that are not its own.
    """

    http: httpx.Client
    others: frozenset[int]

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes of a kind, oldest first."""
        found = [each for each in psutil.Process().children(recursive=True) if each.pid not in self.others]
        named = [each for each in found if "".join(each.cmdline()).startswith(f"ray::{title}")]
        return sorted(named, key=psutil.Process.create_time)

    def deployment(self, name: str) -> psutil.Process:
        """The process of one of its deployments."""
        return self.processes(f"ServeReplica:apart:{name}")[0]


@pytest.fixture(scope="module")
def apart(service: str) -> Iterator[Apart]:
    changes = {"tensor_parallel_size": 1, "cpus_per_rank": 0.05, "cpus_per_helper": 0.02, "spare_group": True}
    settings = settings_of("flux-tiny.yaml").model_dump() | changes
    settings["text_encoder"] |= {"placement": "cpu"}
    settings["vae"] |= {"placement": "cpu"}
    others = frozenset(each.pid for each in psutil.Process().children(recursive=True))
    serve.run(build(Settings.model_validate(settings)), name="apart", route_prefix="/apart")
    with httpx.Client(base_url=f"{service}/apart", timeout=240) as http:
        yield Apart(http, others)
    serve.delete("apart")


@pytest.mark.parametrize("part", ["PromptEncoder", "ImageDecoder"])
def test_a_part_that_dies_on_a_request_is_asked_again(apart: Apart, part: str) -> None:
    body = {"prompt": f"a red circle for {part}", "num_inference_steps": 4}
    finished = metrics(apart.http).get("flux_pictures_finished_total", 0)
    stopped = apart.deployment(part)
    stopped.send_signal(signal.SIGSTOP)  # so that it dies with the request in its hands
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, apart.http, **body)
        if part == "ImageDecoder":
            wait_for(lambda: metrics(apart.http)["flux_pictures_finished_total"] > finished, "the image is denoised")
        time.sleep(1.0)  # for the call to get there; one that comes later finds the next process
        stopped.kill()
        image = asked.result()["data"][0]
    assert psnr(pixels(image), pixels(ask(apart.http, **body)["data"][0])) >= 55


def test_a_spare_takes_the_place_of_a_rank_that_dies(apart: Apart) -> None:
    wait_for(lambda: len(apart.processes("Rank")) == 2, "there is a spare")
    before = metrics(apart.http)["flux_group_rebuilds_total"]
    at_work, spare = apart.processes("Rank")
    at_work.kill()
    wait_for(lambda: metrics(apart.http).get("flux_group_rebuilds_total") == before + 1, "the group is rebuilt")
    ask(apart.http, num_inference_steps=2)
    assert spare.is_running(), "it serves now"
    wait_for(lambda: len(apart.processes("Rank")) == 2, "there is another spare")
    assert apart.processes("Rank")[0] == spare


# Last, since the replica's group goes with it.
def test_images_of_a_replica_that_dies_are_made_again(apart: Apart) -> None:
    undisturbed = ask(apart.http, **LONG)["data"][0]
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(ask, apart.http, **LONG)
        wait_for(lambda: metrics(apart.http)["flux_running_pictures"] == 1, "the image runs")
        apart.deployment("FluxReplica").kill()
        image = disturbed.result()["data"][0]
    assert psnr(pixels(image), pixels(undisturbed)) >= 55
