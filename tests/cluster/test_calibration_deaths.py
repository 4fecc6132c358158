"""Processes that are killed during a calibration cost the run under way; what was measured is kept."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.cluster.asking import metrics, wait_for
from tests.cluster.conftest import settings_of

pytestmark = pytest.mark.faults

STEPS = 24
ASKED = {
    "prompts": ["a red circle on a blue background", "a green square"],
    "size": "64x64",
    "num_inference_steps": STEPS,
    "trial_runs": 0,
}
ALL_RUNS = len(ASKED["prompts"]) + len(probes(STEPS))


@dataclass(frozen=True)
class Calibrating:
    """An application with one API process, beside the one that all tests share.

    Attributes:
        folder: of its profiles.
        others: processes that are not its own.
    """

    http: httpx.Client
    folder: Path
    others: frozenset[int]

    def begin(self, **fields: Any) -> str:
        """The id of a new calibration, once a process takes it."""
        taken: list[str] = []

        def asked() -> bool:
            reply = self.ask("POST", "/v1/calibrations", json=ASKED | fields)
            taken.extend([reply.json()["id"]] if reply is not None and reply.status_code == 202 else [])
            return bool(taken)

        wait_for(asked, "the calibration begins", 120)
        return taken[0]

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """The reply; None where the process that would give it is gone."""
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError:
            return None
        return None if reply.status_code >= 500 else reply

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
        wait_for(lambda: self.status(calibration_id)["status"] != "running", "the calibration is over", 180)
        return self.status(calibration_id)

    def kill(self, title: str) -> None:
        found = [each for each in psutil.Process().children(recursive=True) if each.pid not in self.others]
        (victim,) = [each for each in found if "".join(each.cmdline()).startswith(f"ray::{title}")]
        victim.kill()


@pytest.fixture(scope="module")
def calibrating(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibrating]:
    folder = tmp_path_factory.mktemp("own")
    changes = {"tensor_parallel_size": 1, "cpus_per_rank": 0.05, "cpus_per_helper": 0.02, "api_replicas": 1}
    settings = settings_of("flux-tiny.yaml").model_dump() | changes
    settings["magcache"] |= {"profile_dir": str(folder)}
    others = frozenset(each.pid for each in psutil.Process().children(recursive=True))
    serve.run(build(Settings.model_validate(settings)), name="calibrating", route_prefix="/calibrating")
    with httpx.Client(base_url=f"{service}/calibrating", timeout=240) as http:
        yield Calibrating(http, folder, others)
    serve.delete("calibrating")


@pytest.mark.parametrize(
    ("part", "guidance"),
    [("Coordinator", 5.0), ("ServeReplica:calibrating:FluxReplica", 6.0)],
    ids=["coordinator", "replica"],
)
def test_a_calibration_outlives_what_runs_it(calibrating: Calibrating, part: str, guidance: float) -> None:
    calibration = calibrating.begin(guidance_scale=guidance)
    calibrating.runs(calibration, 2)
    calibrating.kill(part)
    status = calibrating.end(calibration)
    assert status["status"] == "done", status["message"]
    assert status["runs"] == ALL_RUNS, "each of its runs once"


def test_it_outlives_the_api_process_too(calibrating: Calibrating) -> None:
    calibration = calibrating.begin(guidance_scale=7.0)
    before = calibrating.runs(calibration, 4)
    calibrating.kill("ServeReplica:calibrating:ImagesApi")

    def goes_on() -> bool:
        reply = calibrating.ask("GET", f"/v1/calibrations/{calibration}")
        return reply is not None and reply.status_code == 200

    wait_for(goes_on, "another process knows it", 120)
    status = calibrating.end(calibration)
    assert status["status"] == "done", status["message"]
    # The new process's own; the uncached run that later ones are compared with is made again.
    assert metrics(calibrating.http)["flux_calibration_profile_runs_total"] <= ALL_RUNS - before + 1
    assert "flux-tiny-24-64x64-g7" in {profile.name for profile in stored_profiles(calibrating.folder)}
