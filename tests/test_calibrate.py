"""The command that has a service calibrate itself, against the real routes over an in-process backend."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from app import calibrate
from tests.api.conftest import app, backend, base_url, settings
from tests.api.fake_backend import FakeBackend

__all__ = ["app", "backend", "base_url", "settings"]


def run(url: str, *options: str) -> str:
    """The message that the command ends with when it fails."""
    with pytest.raises(SystemExit) as ended:
        calibrate.main(["--url", url, "--look", "0.01", *options])
    return str(ended.value)


def test_a_refusal_is_shown_in_the_services_words(base_url: str) -> None:
    assert run(base_url, "--size", "1x1").startswith("calibration: 400 size '1x1': both sides must be multiples of 16")


def test_a_service_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert "refused" in run(url)


def test_ctrl_c_ends_the_calibration(
    base_url: str, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n two \n")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate.time, "sleep", interrupt)
    options = ["--prompts", str(prompts), "--steps", "12", "--budget-minutes", "1"]
    message = run(base_url, *options)
    (job,) = backend.calibrations.values()
    assert message == f"calibration {job.id} was cancelled: what it found is kept"
    assert (job.prompts, job.steps, job.budget_s) == (("one", "two"), 12, 60.0)
