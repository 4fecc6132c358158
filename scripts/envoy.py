"""Envoy with the configuration in deployments/gateways, in front of a service, on a free port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.serve_process import ROOT, free_port

GATEWAYS = ROOT / "deployments" / "gateways"
PROGRAM = Path(sys.executable).with_name("envoy")
START_S = 120.0


@contextmanager
def envoy(service: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run Envoy in front of ``service`` (host:port), with its file in ``folder``; its address."""
    (host, _, service_port), port, config = service.partition(":"), free_port(), folder / "envoy.yaml"
    addresses = {
        "{address: 127.0.0.1, port_value: 8000}": f"{{address: {host}, port_value: {service_port}}}",
        "{address: 0.0.0.0, port_value: 8080}": f"{{address: 127.0.0.1, port_value: {port}}}",
    }
    config.write_text(replaced((GATEWAYS / "envoy.yaml").read_text(encoding="utf-8"), addresses), encoding="utf-8")
    quiet = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
    with running([str(PROGRAM), "-c", str(config), *quiet], port):
        yield "127.0.0.1", port


def replaced(text: str, changes: dict[str, str]) -> str:
    """``text`` with each key, which it has once, replaced by its value."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a program, from when it listens on ``port``."""
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + START_S
        while not _listens(port):
            assert process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < until
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(START_S)


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
