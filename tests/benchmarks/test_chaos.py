"""The harness of faults: which trials it runs, what it counts, and that it finds and pauses real processes."""

from __future__ import annotations

import base64
import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.chaos import clients, faults
from benchmarks.chaos.__main__ import Session, main, plan
from benchmarks.chaos.clients import Crowd, Outcome, Result
from benchmarks.chaos.faults import WEIGHTS, CutWeights, FullDisk, Kill, Pause, Served
from benchmarks.chaos.report import broken, late, line, merged, table
from benchmarks.chaos.trial import Trial, judge
from benchmarks.chaos.victims import VICTIMS

OFFICIAL, PLAIN = clients.KINDS


def test_a_trial_is_judged_by_what_its_clients_saw() -> None:
    seen = [
        Outcome(OFFICIAL, 0.0, 1.0, Result.RIGHT),
        Outcome(PLAIN, 0.5, 1.5, Result.RIGHT),
        Outcome(PLAIN, 1.5, 2.5, Result.LOST, "503"),
        Outcome(PLAIN, 2.6, 2.7, Result.REFUSED, "503"),
        Outcome(OFFICIAL, 1.0, 10.0, Result.RIGHT),
        Outcome(PLAIN, 3.0, 10.5, Result.WRONG),
    ]
    found = judge("rank 0 killed", "rank", seen, fault_s=2.0, by_hand=False)
    assert found.gap_s == 8.5, "from the last image before the fault to the first after it"
    assert found.lost == {OFFICIAL: 0, PLAIN: 1}
    assert found.refused == {OFFICIAL: 0, PLAIN: 1}
    assert (found.wrong, found.details) == (1, ["503"])
    assert broken([found]) == ["rank 0 killed: 1 wrong images"]
    assert late([found]) == ["rank 0 killed: 8.5 s without an image, the goal is 8 s"]
    assert line(found) == "rank 0 killed: gap 8.5 s, 2 without an image, WRONG, 503"
    assert "| rank 0 killed | 2 | 0 | 2 | 2 | 2 | 8.5 s | 8 s | no |" in table([found, found])


@pytest.mark.parametrize(("kind", "broken_by"), [("rank", 2), ("gcs", 0)])
def test_what_must_never_happen_is_named(kind: str, broken_by: int) -> None:
    lost = [Outcome(OFFICIAL, 1.0, 3.0, Result.LOST, "500"), Outcome(OFFICIAL, 3.0, 4.0, Result.REFUSED, "500")]
    found = judge("a kill", kind, lost, fault_s=2.0, by_hand=True)
    assert found.gap_s == float("inf")
    expected = ["a kill: 2 images that OpenAI's client did not get", "a kill: does not heal by itself"]
    assert broken([found]) == expected[:broken_by], "a machine's service ends with its GCS"


@pytest.mark.parametrize(
    ("kind", "through", "broken_by"),
    [("rank", "", 0), ("api", "", 1), ("proxy", "", 0), ("proxy", "envoy", 1)],
)
def test_a_plain_client_loses_nothing_where_a_part_of_the_service_asks_again(
    kind: str, through: str, broken_by: int
) -> None:
    lost = judge("a kill", kind, [Outcome(PLAIN, 1.0, 3.0, Result.LOST, "503")], fault_s=2.0, by_hand=False)
    assert len(broken([replace(lost, through=through)])) == broken_by


def test_rows_that_are_measured_again_replace_their_own() -> None:
    def trial(fault: str, gap_s: float, through: str = "") -> Trial:
        return Trial(fault, "api", {}, {}, 0, gap_s, by_hand=False, details=[], through=through)

    known = [trial("a", 1.0), trial("b", 1.0), trial("a", 2.0), trial("b", 1.0, "envoy")]
    made = [trial("a", 3.0), trial("b", 2.0, "envoy"), trial("a", 1.0, "envoy")]
    kept = merged(known, made)
    assert [(one.fault, one.through, one.gap_s) for one in kept] == [
        ("a", "", 3.0), ("a", "envoy", 1.0), ("b", "", 1.0), ("b", "envoy", 2.0),
    ]  # fmt: skip
    assert "| a, behind Envoy | 1 |" in table(kept)


@contextmanager
def process(title: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that sleeps."""
    command = [title, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title of a rank."""
    with process("ray::Rank.execute") as started:
        yield started


class _Processes:
    def __init__(self, *pids: int) -> None:
        self._pids = list(pids)

    def processes(self) -> list[int]:
        return self._pids

    def ready(self) -> bool:
        return True


def served(folder: Path, *pids: int) -> Served:
    service: Any = _Processes(*pids)
    return Served(service, folder, {"rank": 1})


def test_a_victim_is_killed_and_one_that_is_not_there_is_named(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    there = served(tmp_path, os.getpid(), sleeper.pid)
    with pytest.raises(LookupError, match="has 0 processes 'ray::Coordinator'"):
        Kill("coordinator").commit(there)
    with pytest.raises(LookupError, match="has 1 processes 'ray::Rank', asked for 1"):
        Kill("rank", 1).commit(there)
    Kill("rank").commit(there)
    assert sleeper.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(("title", "whole"), [("ray::Rank", True), ("ray::Rank.__init__", False)])
def test_a_fault_waits_for_the_successors_of_what_was_killed(tmp_path: Path, title: str, whole: bool) -> None:
    """Although Serve says that all is up: it takes a while to note that a process is gone."""
    with process(title) as rank:
        assert served(tmp_path, rank.pid).is_whole == whole
        rank.kill()
        rank.wait(10)
        assert not served(tmp_path, rank.pid).is_whole


def test_a_paused_victim_goes_on(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: states.append((seconds, _is_soon_stopped(sleeper.pid))))
    Pause("rank", 60.0).commit(served(tmp_path, sleeper.pid))
    assert states == [(60.0, True)]
    assert _is_soon_stopped(sleeper.pid, stopped=False)
    assert sleeper.poll() is None


def _is_soon_stopped(pid: int, stopped: bool = True) -> bool:
    """Whether it is, or is not, stopped within ten seconds: signals are delivered soon, not at once."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if (psutil.Process(pid).status() == psutil.STATUS_STOPPED) == stopped:
            return True
    return False


def test_files_are_whole_again_after_a_fault(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = served(tmp_path, sleeper.pid)
    weights, filling = tmp_path / "model" / WEIGHTS, tmp_path / "ray" / "filling"
    for path in (weights, filling):
        path.parent.mkdir(parents=True)
    weights.write_bytes(bytes(3000))
    sizes: list[int] = []
    monkeypatch.setattr(
        faults.time,
        "sleep",
        lambda _: sizes.extend(path.stat().st_size for path in (weights, filling) if path.exists()),
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, limits[1]))  # stands for the end of the file system
    try:
        FullDisk("ray", 1.0).commit(there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    CutWeights(1.0).commit(there)
    assert sizes == [3000, 5 << 20, 2000]
    assert weights.read_bytes() == bytes(3000)
    assert not filling.exists()


def test_trials_are_of_every_kind_of_process() -> None:
    services = plan(rounds=10, only=[], pause_s=60.0)
    direct = [trial for session in services if not session.through for trial in session.trials]
    single = [trial[0] for trial in direct if len(trial) == 1]
    kills = [fault for fault in single if isinstance(fault, Kill)]
    assert {kill.victim for kill in kills} == set(VICTIMS)
    assert sum(kill.victim == "rank" and kill.number == 1 for kill in kills) == 10
    twice = [trial for trial in direct if len(trial) == 2 and isinstance(trial[1], Kill)]
    assert len(kills) + 2 * len(twice) >= 100
    assert plan(1, ["rank"], 60.0) == [Session("api", [(Kill("rank", 0),), (Kill("rank", 1),)])]
    assert plan(2, ["decoder"], 60.0) == [Session("cpu", [(Kill("decoder"),)] * 2)]
    proxies = [(Kill("proxy"),)]
    assert plan(1, ["proxy"], 60.0) == [Session("api", proxies), Session("api", proxies, through="envoy")]
    (session,) = plan(1, ["pause", "weights"], 5.0)
    assert [type(trial[-1]) for trial in session.trials] == [Pause] * 5 + [CutWeights]


def test_clients_compare_pixels_within_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.full((4, 4, 3), 100, dtype=np.int16)
    made = iter([100, 101, 99, 102])

    def ask(_: Any) -> str:
        level = next(made, None)
        if level is None:
            raise RuntimeError("503: busy")
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (level, 100, 100)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    monkeypatch.setattr(clients, "KINDS", {OFFICIAL: lambda url: nullcontext(ask)})
    monkeypatch.setattr(clients, "PAUSE_S", 0.0)
    crowd = Crowd("http://nowhere", [{"prompt": "a"}], [expected], each=1, fault_s=0.0)
    crowd.start()
    while len(crowd.outcomes) < 6:
        time.sleep(0.001)
    crowd.stop()
    results = [one.result for one in crowd.outcomes[:5]]
    assert results == [Result.RIGHT] * 3 + [Result.WRONG, Result.REFUSED]
    assert crowd.right_since(0.0) == {OFFICIAL: 3}


@pytest.mark.bench
def test_a_short_run_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The coordinator of a real service is killed under load."""
    assert main(["--short", "--port", "8021"]) == 0
    assert "| coordinator killed | 1 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
