"""`make demo`, over a stand-in for `serve run` that fails, crashes, survives or serves as told."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import demo, serve_process
from scripts.serve_process import free_port

ROOT = Path(__file__).parent.parent

# Behaves like `serve run` towards the demo: starts helpers in its session, writes a log, serves, ends on Ctrl-C.
STAND_IN = """
import base64, http.server, json, os, signal, subprocess, sys, time
mode, port = sys.argv[1], int(sys.argv[2])
if mode == "crash":
    sys.exit("no module named app.mian")
if mode.startswith("late"):
    with open(sys.argv[0] + ".tries", "a+") as tries:
        tries.write(".")
        tries.seek(0)
        if len(tries.read()) <= int(mode.split()[1]):
            sys.exit("Exception: The current node timed out during startup. This could happen because")
# One helper that ends politely and one, like a hung worker in a process group of its own, that does not.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stubborn], process_group=0)
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        loras = [{"id": "heart"}, {"id": "night"}] if self.path == "/v1/loras" else []
        self.reply(503 if mode == "never" else 200, {"data": loras})
    def do_POST(self):
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if wish.get("size") == "1x1":
            return self.reply(400, {"error": {"message": "size is 1x1; at least 64x64", "param": "size"}})
        magcache = {"enabled": True, "schedule": "CC.C..", "computed": 3, "skipped": 3, "predicted_error": 0.125}
        timings = {"queue_s": 0.1, "encode_s": 0.2, "denoise_s": 1.5, "decode_s": 0.3, "total_s": 2.125}
        shown = wish["prompt"] + "".join(" with " + one["name"] for one in wish.get("lora", []))
        image = {"b64_json": base64.b64encode(shown.encode()).decode(), "seed": wish["seed"]}
        self.reply(200, {"size": "128x128", "data": [image | {"magcache": magcache, "timings": timings}]})
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(name="port")
def choose_port() -> int:
    return free_port()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with a stand-in for the environment's `serve`."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return tmp_path


def _service(folder: Path, mode: str, port: int) -> demo.Service:
    command = [sys.executable, str(folder / "stand_in.py"), mode, str(port)]
    return demo.Service(command, f"http://127.0.0.1:{port}", folder / "serve.log")


def _options(folder: Path, *arguments: str) -> list[str]:
    return ["--out", str(folder / "out/demo.png"), "--log", str(folder / "serve.log"), "--timeout", "20", *arguments]


@pytest.fixture
def started(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[demo.Service]]:
    """Let the demo start the stand-in in the mode that the environment names; gives the services that it started."""
    services: list[demo.Service] = []

    def service_of(_: object) -> demo.Service:
        services.append(_service(folder, os.environ["STAND_IN_MODE"], port))
        return services[-1]

    monkeypatch.setattr(demo, "service_of", service_of)
    monkeypatch.setattr(serve_process, "PATIENCE_S", 0.5)
    handlers = {number: signal.getsignal(number) for number in demo.STOP_SIGNALS}
    yield services
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for service in services:
        service.stop()


def test_a_schedule_is_drawn_over_a_ruler() -> None:
    assert demo.draw_schedule("CC.C........C") == ["██·█········█", "0         10"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"http_options": {"host": "0.0.0.0", "port": 9}}, ("0.0.0.0", 9)),
        ({"http_options": None}, ("127.0.0.1", 8000)),
        ({}, ("127.0.0.1", 8000)),
    ],
)
def test_the_address_is_the_configs(config: dict[str, Any], expected: tuple[str, int]) -> None:
    assert demo.address(config) == expected


def test_once_writes_the_image_reports_and_leaves_nothing(
    folder: Path,
    port: int,
    started: list[demo.Service],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "serve")
    assert demo.main(_options(folder, "--once", "--prompt", "a red circle")) == 0
    assert (folder / "out/demo.png").read_bytes() == b"a red circle"
    assert (folder / "out/demo-lora.png").read_bytes() == b"a red circle with heart"
    output = capsys.readouterr().out
    for expected in ("██·█··", "3 of 6 computed, 3 skipped (50%), predicted error 0.125", "denoise 1.50 s", "seed 7"):
        assert expected in output
    assert started[0].processes() == []
    demo.check_port("127.0.0.1", port)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(
    stop: signal.Signals,
    folder: Path,
    port: int,
    started: list[demo.Service],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "serve")
    seen: list[str] = []

    def watch(service: demo.Service) -> None:
        seen.extend(capsys.readouterr().out.splitlines())
        assert service.ready()
        assert len(service.processes()) == 3
        signal.raise_signal(stop)

    monkeypatch.setattr(demo.Service, "watch", watch)
    assert demo.main(_options(folder)) == 0
    assert seen[-1] == f"http://127.0.0.1:{port}/"
    assert started[0].processes() == []


def test_a_stop_while_it_starts_leaves_nothing(
    folder: Path, started: list[demo.Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "never")
    monkeypatch.setattr(demo.Service, "check", lambda _: signal.raise_signal(signal.SIGINT))
    assert demo.main(_options(folder)) == 128 + signal.SIGINT
    assert started[0].processes() == []


def test_a_crash_ends_with_the_log(
    folder: Path, started: list[demo.Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "crash")
    assert demo.main(_options(folder)) == 1
    assert "no module named app.mian" in capsys.readouterr().err


@pytest.mark.parametrize(("times", "code"), [(2, 0), (3, 1)])
def test_a_ray_that_is_too_slow_for_itself_is_started_again(
    folder: Path,
    started: list[demo.Service],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: int,
    code: int,
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", f"late {times}")
    assert demo.main(_options(folder, "--once")) == code
    assert ("timed out during startup" in capsys.readouterr().err) == (code == 1)
    assert started[0].processes() == []


def test_a_service_that_is_never_ready_times_out(
    folder: Path, started: list[demo.Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "never")
    assert demo.main(_options(folder, "--timeout", "1")) == 1
    assert "not ready after 1 s" in capsys.readouterr().err
    assert started[0].processes() == []


def test_a_failed_deployment_ends_with_its_reason(
    folder: Path, started: list[demo.Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traceback = """The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica.initialize()\x1b[39m (pid=1)
  File "replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  File "engine.py", line 2, in load
ValueError: tensor_parallel_size 5 does not divide 6 heads"""
    replica = {"status": "DEPLOY_FAILED", "message": traceback}
    flux = {"status": "DEPLOY_FAILED", "message": "Failed to update", "deployments": {"FluxReplica": replica}}

    monkeypatch.setenv("STAND_IN_MODE", "never")
    monkeypatch.setattr(demo.Service, "_ask_dashboard", lambda _: {"flux": flux})
    assert demo.main(_options(folder)) == 1
    message = capsys.readouterr().err
    assert "Failed to update" in message
    assert "FluxReplica: ValueError: tensor_parallel_size 5 does not divide 6 heads\n" in message
    assert "File" not in message
    assert started[0].processes() == []


def test_the_dashboards_address_is_read_from_the_log(folder: Path, port: int) -> None:
    service = _service(folder, "serve", port)
    service.log.write_text("INFO worker.py:2029 -- View the dashboard at \x1b[1m\x1b[32mhttp://127.0.0.1:8266 \x1b[39m")
    found = serve_process._DASHBOARD.search(service.log.read_text())
    assert found
    assert found[2] == "127.0.0.1:8266"


def test_a_refused_request_says_why(
    folder: Path, started: list[demo.Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "serve")
    assert demo.main(_options(folder, "--once", "--size", "1x1")) == 1
    assert "400: size is 1x1; at least 64x64" in capsys.readouterr().err


def test_a_port_in_use_is_named(folder: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert demo.main(_options(folder, "--port", str(port))) == 1
    message = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert f"--url http://127.0.0.1:{port}" in message


def test_a_missing_config_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(_options(folder, "--config", "deployments/flux-tony.yaml")) == 1
    assert "flux-tony.yaml" in capsys.readouterr().err
