"""``python -m app.serve`` as a real process: what SIGTERM does to requests under way and to later ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = "/v1/images/generations"
LONG = {"prompt": "a red circle", "num_inference_steps": 60, "magcache": {"enabled": False}, "response_format": "file"}


@pytest.fixture
def url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def process(url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    config = yaml.safe_load((ROOT / "deployments/flux-tiny.yaml").read_text())
    config["http_options"]["port"] = int(url.rpartition(":")[2])
    config["applications"][0]["args"]["drain_seconds"] = 60.0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.serve", str(path), "--address", "local"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for left in _session_of(process):
                left.kill()
            process.wait()


def _session_of(leader: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What still runs of the processes that ``leader`` started: Ray's stay in its session."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(each.pid) == leader.pid and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _until(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


def _health(client: httpx.Client) -> int:
    try:
        return client.get("/health").status_code
    except httpx.TransportError:
        return 0


def _running(client: httpx.Client) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith("flux_running_pictures{"))
    return float(line.rpartition(" ")[2])


def test_sigterm_loses_no_image(process: subprocess.Popen[bytes], url: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(6) as pool:
        _until(lambda: _health(client) == 200)
        under_way = [pool.submit(client.post, IMAGES, json=LONG | {"seed": seed}) for seed in range(6)]
        _until(lambda: _running(client) == 6)
        process.send_signal(signal.SIGTERM)
        _until(lambda: _health(client) == 503)
        assert not any(each.done() for each in under_way)
        refused = client.post(IMAGES, json=LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the service is stopping; ask again"
        assert int(refused.headers["retry-after"]) >= 1
        for reply in (each.result() for each in under_way):
            assert reply.status_code == 200
            (tmp_path / "image.png").write_bytes(reply.content)
            Image.open(tmp_path / "image.png").load()
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    _until(lambda: not _session_of(process), 30)
