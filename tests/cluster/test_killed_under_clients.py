"""Processes killed under clients that never ask twice: each gets its image, and each image is made once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from scripts.envoy import envoy
from tests.cluster.asking import IMAGES, PROMPT, kill_process, metrics, pixels
from tests.cluster.test_api_processes import ok_by_process
from tests.patience import ANSWER_S, wait_for

pytestmark = pytest.mark.faults

BODIES = [
    {"prompt": PROMPT, "seed": seed, "num_inference_steps": 40, "magcache": {"enabled": False}} for seed in range(4)
]
LEVEL = 1 / 255 + 1e-6
"""What an image may differ by, since it depends on what shared its batches."""


@pytest.fixture(scope="module")
def expected(service: str) -> list[np.ndarray]:
    return [pixels(reply.json()["data"][0]) for reply in made(service, [service] * 4, killed=None)]


@pytest.fixture(scope="module")
def gateway(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with envoy(service.removeprefix("http://"), tmp_path_factory.mktemp("envoy")) as (host, port):
        yield f"http://{host}:{port}"


def made(service: str, urls: list[str], killed: str | None) -> list[httpx.Response]:
    """The replies to `BODIES`, each from one of ``urls``, a process of the service having been killed meanwhile."""
    with httpx.Client(base_url=service, timeout=ANSWER_S) as http:
        wait_for(lambda: len(ok_by_process(http.get("/metrics").text)) == 2, "both API processes are there")
        before = metrics(http)["flux_pictures_finished_total"]
        with ThreadPoolExecutor(len(BODIES)) as pool:
            asked = [
                pool.submit(httpx.post, f"{url}{IMAGES}", json=body, timeout=ANSWER_S)
                for url, body in zip(urls, BODIES, strict=True)
            ]
            wait_for(lambda: metrics(http)["flux_running_pictures"] == len(BODIES), "all run")
            if killed is not None:
                kill_process(killed)
            replies = [each.result() for each in asked]
        assert [reply.status_code for reply in replies] == [200] * len(BODIES), [reply.text for reply in replies]
        assert metrics(http)["flux_pictures_finished_total"] - before == len(BODIES), "each is made once"
    return replies


def joined(replies: list[httpx.Response], expected: list[np.ndarray]) -> int:
    """How many got an image that another request had begun; all are as ``expected``."""
    for reply, right in zip(replies, expected, strict=True):
        assert np.abs(pixels(reply.json()["data"][0]) - right).max() <= LEVEL
    return sum("idempotent-replayed" in reply.headers for reply in replies)


def test_an_api_process_is_killed(service: str, gateway: str, expected: list[np.ndarray]) -> None:
    """Ray's proxy asks another one, with a gateway in front or without."""
    replies = made(service, [service, service, gateway, gateway], killed="ServeReplica:flux:ImagesApi")
    assert joined(replies, expected) > 0, "the process that was killed had some of them"


def test_the_proxy_is_killed(service: str, gateway: str, expected: list[np.ndarray]) -> None:
    """Envoy asks again until Serve has started another one."""
    assert joined(made(service, [gateway] * 4, killed="ProxyActor"), expected) == len(BODIES)
