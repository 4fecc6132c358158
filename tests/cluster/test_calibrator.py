"""The running service calibrates itself: over HTTP, with the ranks that serve, at sizes that no other test uses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app import calibrate
from app.cluster.backend import ServeBackend
from app.cluster.calibrator import Calibrator
from app.cluster.coordinators import Coordinators
from app.messages.calibration import CalibrationJob
from app.settings import MagCacheSettings, Settings
from magcache_core import stored_profiles
from magcache_core.measure import probes
from tests.cluster.asking import events_of
from tests.patience import wait_for

PROMPTS = ["a red circle on a blue background", "a green square"]
SMALL = {"size": "64x64", "num_inference_steps": 6, "prompts": PROMPTS, "trial_runs": 1, "moves": 0}


def ended(http: httpx.Client, calibration_id: str, limit_s: float = 120.0) -> dict[str, Any]:
    """The status once it is over."""

    def status() -> dict[str, Any]:
        found: dict[str, Any] = http.get(f"/v1/calibrations/{calibration_id}").json()
        return found

    wait_for(lambda: status()["status"] != "running", "the calibration is over", limit_s)
    return status()


def image(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": "a yellow star", "seed": 3, "size": "64x64", "num_inference_steps": 6, **fields}
    reply = http.post("/v1/images/generations", json=asked)
    reply.raise_for_status()
    made: dict[str, Any] = reply.json()["data"][0]
    return made


def test_it_calibrates_itself_and_plans_with_the_profile(http: httpx.Client, profile_dir: Path) -> None:
    name = "flux-tiny-6-64x64-g3.5"
    assert not image(http)["magcache"]["profile"].startswith(name)
    started = http.post("/v1/calibrations", json=SMALL | {"computed_steps": 3})
    assert started.status_code == 202
    status = started.json()
    assert (status["status"], status["phase"], status["runs"]) == ("running", "record", 0)
    another = http.post("/v1/calibrations", json=SMALL)
    assert (another.status_code, another.json()["error"]["code"]) == (409, "calibration_under_way")
    image(http)  # a client's image in between
    status = ended(http, status["id"])
    assert status["status"] == "done", status["message"]
    (profile,) = [one for one in stored_profiles(profile_dir) if one.name == name]
    assert status["profile"] == f"{profile.name}@{profile.version}"
    assert profile.model == "models/flux-tiny"
    assert profile.provenance["runs"] == len(PROMPTS)
    assert {trial.computed for trial in profile.trials} >= {3}
    after = image(http)["magcache"]
    assert after["profile"] == status["profile"]
    assert after["schedule"] == next(trial.schedule for trial in profile.trials if trial.computed == 3)
    assert image(http, size="128x128", num_inference_steps=28)["magcache"]["profile"].startswith("flux-tiny@")
    assert {path.suffix for path in profile_dir.iterdir()} == {".json"}


def test_true_cfg_is_calibrated_and_followed(http: httpx.Client, profile_dir: Path) -> None:
    guided = {"negative_prompt": "", "true_cfg_scale": 4.0}
    asked = SMALL | guided | {"trial_runs": 0, "computed_steps": 4}
    started = http.post("/v1/calibrations", json=asked).json()["id"]
    with http.stream("GET", f"/v1/calibrations/{started}", headers={"Accept": "text/event-stream"}) as reply:
        events = list(events_of(reply))
    assert {event["type"] for event in events[:-1]} <= {"calibration.running"}
    last = events[-1]
    assert (last["type"], last["progress"]) == ("calibration.done", 1.0), last["message"]
    name = "flux-tiny-6-64x64-g3.5-cfg4"
    (profile,) = [one for one in stored_profiles(profile_dir) if one.name == name]
    assert (profile.true_cfg_scale, set(profile.branches)) == (4.0, {"cond", "uncond"})
    made = image(http, **guided)["magcache"]
    assert (made["profile"], made["schedule"].count("C")) == (last["profile"], 4)
    assert not image(http)["magcache"]["profile"].startswith(name)
    found = [
        (sample.name, sample.labels["profile"], sample.value)
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.labels.get("profile") == name
    ]
    assert ("flux_calibration_progress", name, 1.0) in found
    runs = sum(value for metric, _, value in found if metric == "flux_calibration_profile_runs_total")
    assert runs == last["runs"] == len(PROMPTS) + len(probes(6))


def test_an_ended_one_goes_on_where_it_was(http: httpx.Client, profile_dir: Path) -> None:
    asked = SMALL | {"guidance_scale": 9.0, "num_inference_steps": 24}
    first = http.post("/v1/calibrations", json=asked).json()["id"]
    wait_for(lambda: http.get(f"/v1/calibrations/{first}").json()["runs"] >= 3, "three runs are done")
    cancelled = http.delete(f"/v1/calibrations/{first}").json()
    assert (cancelled["status"], cancelled["profile"]) == ("cancelled", None)
    assert http.delete(f"/v1/calibrations/{first}").json() == cancelled
    assert (profile_dir / ".flux-tiny-24-64x64-g9.findings").is_file()
    second = http.post("/v1/calibrations", json=asked | {"trial_runs": 0}).json()["id"]
    status = ended(http, second)
    assert status["status"] == "done", status["message"]
    assert status["runs"] <= 2 + 9 + 1 + 1, "two recorded, nine probes, the reference again, one lost"


async def test_a_service_that_stops_ends_it_and_begins_none(tmp_path: Path) -> None:
    class Silent:
        """Stands for an encoder that does not answer."""

        async def encode(self, prompt: str) -> None:
            await asyncio.Event().wait()

    settings = Settings(magcache=MagCacheSettings(profile_dir=str(tmp_path), calibrate="idle"))
    backend = ServeBackend(settings, Silent(), None, None)
    started = await backend.calibrate(CalibrationJob("calibration-1", ("a",), 8, 64, 64, 3.5, 3, (3,)))
    await asyncio.sleep(0)
    await backend.stop_background()
    left = Calibrator(settings, Silent(), None, None, Coordinators())
    interrupted = left.interrupted()
    assert interrupted is not None, "the next one of this service goes on with it"
    assert interrupted.id == started.id
    assert (started.state, (await backend.calibration(started.id)).state) == ("running", "cancelled")
    assert backend._idle is not None
    await asyncio.wait({backend._idle}, timeout=10)
    assert backend._idle.cancelled()
    await backend.stop_background()
    left.start(CalibrationJob("calibration-2", ("a",), 8, 64, 64, 3.5, 3, (3,)))
    await asyncio.sleep(0)
    await left.cancel("calibration-2")
    assert left.interrupted() is None, "it was ended on purpose"


def test_the_command_shows_the_profile(service: str, capsys: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n")
    options = ["--steps", "8", "--size", "80x64", "--trials", "0", "--prompts", str(prompts), "--look", "0.1"]
    calibrate.main(["--url", service, *options])
    assert capsys.readouterr().out.startswith("profile flux-tiny-8-80x64-g3.5@")
