"""Processes that die in the middle of their work cost no image and no calibration; told in order, to a group's end.

All parts have processes of their own here, and a spare group takes the place of one that broke.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
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
from magcache_core import stored_profiles
from magcache_core.measure import probes
from tests.cluster.asking import IMAGES, PROMPT, ask, metrics, pixels
from tests.cluster.conftest import settings_of
from tests.local_group import MODEL, psnr
from tests.patience import ANSWER_S, wait_for

pytestmark = pytest.mark.faults

LONG = {"num_inference_steps": 100, "magcache": {"enabled": False}}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
STEPS = 24
CALIBRATION = {
    "prompts": ["a red circle on a blue background", "a green square"],
    "size": "64x64",
    "num_inference_steps": STEPS,
    "trial_runs": 0,
}
ALL_RUNS = len(CALIBRATION["prompts"]) + len(probes(STEPS))


@dataclass(frozen=True)
class Apart:
    """An application beside the one that all tests share.

    Attributes:
        folder: has ``flux-tiny``, a copy of the checkpoint, and ``profiles``.
        others: processes that are not its own.
    """

    http: httpx.Client
    folder: Path
    others: frozenset[int]

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes of a kind, oldest first."""
        found = [each for each in psutil.Process().children(recursive=True) if each.pid not in self.others]
        named = [each for each in found if "".join(each.cmdline()).startswith(f"ray::{title}")]
        return sorted(named, key=psutil.Process.create_time)

    def deployment(self, name: str) -> psutil.Process:
        """The process of one of its deployments."""
        return self.processes(f"ServeReplica:apart:{name}")[0]

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """The reply; None where the process that would give it is gone."""
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError:
            return None
        return None if reply.status_code >= 500 else reply

    def begin(self, **fields: Any) -> str:
        """The id of a new calibration, once a process takes it."""
        taken: list[str] = []

        def asked() -> bool:
            reply = self.ask("POST", "/v1/calibrations", json=CALIBRATION | fields)
            taken.extend([reply.json()["id"]] if reply is not None and reply.status_code == 202 else [])
            return bool(taken)

        wait_for(asked, "the calibration begins")
        return taken[0]

    def status(self, calibration_id: str) -> dict[str, Any]:
        reply = self.ask("GET", f"/v1/calibrations/{calibration_id}")
        assert reply is not None
        status: dict[str, Any] = reply.json()
        return status

    def runs(self, calibration_id: str, least: int) -> int:
        """How many there are, once they are so many."""
        wait_for(lambda: self.status(calibration_id)["runs"] >= least, f"{least} runs are done")
        status = self.status(calibration_id)
        assert status["status"] == "running", status
        return int(status["runs"])

    def end(self, calibration_id: str) -> dict[str, Any]:
        """The status once it is over."""
        wait_for(lambda: self.status(calibration_id)["status"] != "running", "the calibration is over")
        return self.status(calibration_id)


@pytest.fixture(scope="module")
def apart(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("apart")
    shutil.copytree(MODEL, folder / "flux-tiny", ignore=shutil.ignore_patterns("*.png", "*.md"))
    settings = settings_of("flux-tiny.yaml").model_dump() | {
        "model": str(folder / "flux-tiny"),
        "tensor_parallel_size": 1,
        "cpus_per_rank": 0.05,
        "cpus_per_helper": 0.02,
        "spare_group": True,
        "rebuild_attempts": 1,
    }
    settings["text_encoder"] |= {"placement": "cpu"}
    settings["vae"] |= {"placement": "cpu"}
    settings["magcache"] |= {"profile_dir": str(folder / "profiles")}
    (folder / "profiles").mkdir()
    others = frozenset(each.pid for each in psutil.Process().children(recursive=True))
    serve.run(build(Settings.model_validate(settings)), name="apart", route_prefix="/apart")
    with httpx.Client(base_url=f"{service}/apart", timeout=ANSWER_S) as http:
        yield Apart(http, folder, others)
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


def test_a_calibration_outlives_its_coordinator(apart: Apart) -> None:
    calibration = apart.begin(guidance_scale=5.0)
    apart.runs(calibration, 2)
    apart.processes("Coordinator")[0].kill()
    status = apart.end(calibration)
    assert status["status"] == "done", status["message"]
    assert status["runs"] == ALL_RUNS, "each of its runs once"


def test_images_and_a_calibration_outlive_the_replica_that_runs_them(apart: Apart) -> None:
    """Its group goes with it."""
    undisturbed = ask(apart.http, **LONG)["data"][0]
    calibration = apart.begin(guidance_scale=6.0)
    apart.runs(calibration, 2)
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(ask, apart.http, **LONG)
        wait_for(lambda: metrics(apart.http)["flux_running_pictures"] == 1, "the image runs")
        apart.deployment("FluxReplica").kill()
        image = disturbed.result()["data"][0]
    assert psnr(pixels(image), pixels(undisturbed)) >= 55
    status = apart.end(calibration)
    assert status["status"] == "done", status["message"]
    assert status["runs"] == ALL_RUNS, "each of its runs once"


def test_a_calibration_outlives_the_api_process_too(apart: Apart) -> None:
    calibration = apart.begin(guidance_scale=7.0)
    before = apart.runs(calibration, 4)
    apart.deployment("ImagesApi").kill()

    def goes_on() -> bool:
        reply = apart.ask("GET", f"/v1/calibrations/{calibration}")
        return reply is not None and reply.status_code == 200

    wait_for(goes_on, "another process knows it")
    status = apart.end(calibration)
    assert status["status"] == "done", status["message"]
    # The new process's own; the uncached run that later ones are compared with is made again.
    assert metrics(apart.http)["flux_calibration_profile_runs_total"] <= ALL_RUNS - before + 1
    assert "flux-tiny-24-64x64-g7" in {profile.name for profile in stored_profiles(apart.folder / "profiles")}


# Last, since the group is gone afterwards.
def test_a_group_that_cannot_be_rebuilt_says_why(apart: Apart) -> None:
    wait_for(lambda: len(apart.processes("Rank")) == 2, "there is a spare")
    weights = apart.folder / "flux-tiny" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    apart.processes("Rank")[0].kill()
    reply = apart.http.post(IMAGES, json={"prompt": PROMPT, **LONG})
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert error["message"].startswith("the tensor-parallel group cannot be rebuilt: CheckpointError: ")
    assert WEIGHTS in error["message"]
    assert int(reply.headers["retry-after"]) >= 1
    health = apart.http.get("/health").json()
    assert any("cannot be rebuilt: CheckpointError" in trouble for trouble in health["details"]["troubles"])
    for text in (reply.text, json.dumps(health)):
        assert not any(word in text for word in ("pid", "ip=", "actor", "ray::", "Traceback"))
