"""The replica rebuilds a group that breaks: it costs time and no image."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest

from app.cluster.replica import _with_time_left
from app.errors import DeadlinePassedError
from magcache_core.measure import probes
from tests.cluster.asking import IMAGES, PROMPT, ask, events_of, kill_process, metrics, newest_process, pixels
from tests.cluster.test_calibrator import PROMPTS, SMALL, ended
from tests.cluster.test_inpainting_service import encoded, source, white
from tests.cluster.test_lora_service import with_lora
from tests.local_group import job, psnr
from tests.patience import wait_for

LONG = {"num_inference_steps": 100, "magcache": {"enabled": False}}
CACHED = {"num_inference_steps": 100, "magcache": {"computed_steps": 60}}


def several(http: httpx.Client) -> list[Any]:
    return [pixels(image) for image in ask(http, **LONG, n=2)["data"]]


def adapted(http: httpx.Client) -> list[Any]:
    return [pixels(ask(http, **LONG, **with_lora())["data"][0])]


def inpainted(http: httpx.Client) -> list[Any]:
    form = {"prompt": PROMPT, "seed": "7", "size": "128x128", **{name: json.dumps(one) for name, one in CACHED.items()}}
    reply = http.post("/v1/images/edits", data=form, files={"image": encoded(source()), "mask": encoded(white())})
    assert reply.status_code == 200, reply.text
    return [pixels(reply.json()["data"][0])]


def streamed(http: httpx.Client, at_first_preview: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """The events of an image's stream."""
    events: list[dict[str, Any]] = []
    body = {"prompt": PROMPT, "seed": 8, **LONG, "stream": True, "progress": True, "partial_images": 3}
    with http.stream("POST", IMAGES, json=body) as reply:
        for event in events_of(reply):
            events.append(event)
            if event.get("partial_image_index") == 0 and at_first_preview is not None:
                at_first_preview()
                at_first_preview = None
    assert events[-1]["type"] == "image_generation.completed", events[-1]
    return events


@pytest.mark.faults
def test_a_killed_rank_costs_time_and_no_work(http: httpx.Client) -> None:
    """Images of every kind in one batch, a stream among them, and a calibration behind them."""
    kinds = (several, adapted, inpainted)
    undisturbed = [*(image for make in kinds for image in make(http)), pixels(streamed(http)[-1])]
    rebuilds = metrics(http)["flux_group_rebuilds_total"]
    asked = SMALL | {"guidance_scale": 8.0, "num_inference_steps": 20, "trial_runs": 0, "size": "64x80"}
    calibration = http.post("/v1/calibrations", json=asked).json()["id"]
    wait_for(lambda: http.get(f"/v1/calibrations/{calibration}").json()["runs"] >= 2, "two runs are recorded")
    with ThreadPoolExecutor(len(kinds)) as pool:
        disturbed = [pool.submit(make, http) for make in kinds]

        def kill() -> None:
            assert metrics(http)["flux_running_pictures"] == len(undisturbed)
            kill_process("Rank")
            assert not any(one.done() for one in disturbed)

        events = streamed(http, kill)
        images = [image for one in disturbed for image in one.result()]
    for first, second in zip([*images, pixels(events[-1])], undisturbed, strict=True):
        assert psnr(first, second) >= 55
    steps = [event["step"] for event in events if event["type"] == "flux.progress"]
    assert steps != sorted(steps), "it was made again from the beginning"
    indices = [event["partial_image_index"] for event in events if "partial_image_index" in event]
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    status = ended(http, calibration)
    assert status["status"] == "done", status["message"]
    assert status["runs"] == len(PROMPTS) + len(probes(20)), "each of its runs once"
    assert metrics(http)["flux_group_rebuilds_total"] == rebuilds + 1


@pytest.mark.faults
def test_a_killed_coordinator_costs_time_and_no_image(http: httpx.Client) -> None:
    undisturbed = several(http)
    rebuilds = metrics(http)["flux_group_rebuilds_total"]
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(several, http)
        wait_for(lambda: metrics(http)["flux_running_pictures"] == len(undisturbed), "both images run")
        kill_process("Coordinator")
        assert not disturbed.done()
        for first, second in zip(disturbed.result(), undisturbed, strict=True):
            assert psnr(first, second) >= 55
    assert metrics(http)["flux_group_rebuilds_total"] == rebuilds + 1


@pytest.mark.faults
def test_a_rank_that_stops_in_the_middle_of_images_is_replaced_and_they_are_made_again(http: httpx.Client) -> None:
    undisturbed = several(http)
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(several, http)
        wait_for(lambda: metrics(http)["flux_running_pictures"] == len(undisturbed), "both images run")
        stopped = newest_process("Rank")
        stopped.send_signal(signal.SIGSTOP)
        assert not disturbed.done()
        for first, second in zip(disturbed.result(), undisturbed, strict=True):
            assert psnr(first, second) >= 55
    wait_for(lambda: not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, "the stopped rank is killed")


def health(http: httpx.Client) -> tuple[int, int, int]:
    reply = http.get("/health")
    details = reply.json()["details"]
    return reply.status_code, details["groups_ready"], details["groups"]


@pytest.mark.faults
def test_an_idle_group_whose_rank_dies_is_replaced(http: httpx.Client) -> None:
    """Health tells of it before any request does, and again when the new group is whole."""
    before = metrics(http)["flux_group_rebuilds_total"]
    assert health(http) == (200, 1, 1)
    kill_process("Rank")
    wait_for(lambda: health(http) == (503, 0, 1), "the group counts as not ready")
    wait_for(lambda: health(http) == (200, 1, 1), "the group is replaced")
    assert metrics(http)["flux_group_rebuilds_total"] == before + 1
    ask(http, num_inference_steps=2)


def test_a_repeated_image_has_what_is_left_of_its_deadline() -> None:
    asked = job("a/0", deadline_s=10.0)
    assert _with_time_left(asked, 4.0) == replace(asked, deadline_s=6.0)
    with pytest.raises(DeadlinePassedError, match="while the tensor-parallel group was rebuilt"):
        _with_time_left(asked, 10.0)
    endless = job("a/0")
    assert _with_time_left(endless, 1e9) is endless
