"""The replica rebuilds a group that breaks: it costs time and no image."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.cluster.replica import _with_time_left
from app.errors import DeadlinePassedError
from tests.cluster.asking import IMAGES, PROMPT, ask, events_of, kill_process, metrics, pixels, wait_for
from tests.local_group import job, psnr


@pytest.mark.parametrize("victim", ["Rank", "Coordinator"])
def test_a_killed_process_costs_time_and_no_image(http: httpx.Client, victim: str) -> None:
    body = {"magcache": {"enabled": False}, "num_inference_steps": 100, "n": 3}
    undisturbed = ask(http, **body)
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(ask, http, **body)
        wait_for(lambda: metrics(http)["flux_running_pictures"] == 3, "all three images run")
        kill_process(victim)
        assert not disturbed.done()
        images = disturbed.result()["data"]
    for first, second in zip(images, undisturbed["data"], strict=True):
        assert psnr(pixels(first), pixels(second)) >= 55
    assert metrics(http)["flux_group_rebuilds_total"] >= 1


def health(http: httpx.Client) -> tuple[int, int, int]:
    reply = http.get("/health")
    details = reply.json()["details"]
    return reply.status_code, details["groups_ready"], details["groups"]


def test_an_idle_group_whose_rank_dies_is_replaced(http: httpx.Client) -> None:
    """Health tells of it before any request does, and again when the new group is whole."""
    before = metrics(http)["flux_group_rebuilds_total"]
    assert health(http) == (200, 1, 1)
    kill_process("Rank")
    wait_for(lambda: health(http) == (503, 0, 1), "the group counts as not ready")
    wait_for(lambda: health(http) == (200, 1, 1), "the group is replaced")
    assert metrics(http)["flux_group_rebuilds_total"] == before + 1
    ask(http, num_inference_steps=2)


def test_a_stream_goes_on_when_its_group_is_rebuilt(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 100, "magcache": {"enabled": False}}
    undisturbed = ask(http, **body)["data"][0]
    extra = {"stream": True, "progress": True, "partial_images": 3}
    events: list[dict[str, Any]] = []
    with http.stream("POST", IMAGES, json=body | extra) as reply:
        for event in events_of(reply):
            events.append(event)
            if event["type"] == "image_generation.partial_image" and event["partial_image_index"] == 0:
                kill_process("Rank")
    assert events[-1]["type"] == "image_generation.completed"
    assert psnr(pixels(events[-1]), pixels(undisturbed)) >= 55
    steps = [event["step"] for event in events if event["type"] == "flux.progress"]
    assert steps != sorted(steps), "it was made again from the beginning"
    indices = [event["partial_image_index"] for event in events if "partial_image_index" in event]
    assert indices == sorted(set(indices))
    assert indices[0] == 0


def test_a_replica_is_up_without_the_models_libraries() -> None:
    """They take 3 s of CPU, for which its ranks would start later; the check of the checkpoint reads them meanwhile."""
    code = "import sys, app.cluster.replica; print(*sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_repeated_image_has_what_is_left_of_its_deadline() -> None:
    asked = job("a/0", deadline_s=10.0)
    assert _with_time_left(asked, 4.0) == replace(asked, deadline_s=6.0)
    with pytest.raises(DeadlinePassedError, match="while the tensor-parallel group was rebuilt"):
        _with_time_left(asked, 10.0)
    endless = job("a/0")
    assert _with_time_left(endless, 1e9) is endless
