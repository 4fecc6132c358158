"""nginx and Envoy with the configurations in deployments/gateways, in front of a service, on free ports."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.ops.needs import missing

GATEWAYS = Path(__file__).parents[1] / "deployments/gateways"
ENVOY = Path(sys.executable).with_name("envoy")
SERVICE = "127.0.0.1:8000"  # where the configurations expect it


def nginx_command(config: Path) -> list[str]:
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") or missing(
        "nginx is not installed (Debian's package nginx-light)"
    )
    return [program, "-c", str(config), "-g", "daemon off;"]


def envoy_command(config: Path) -> list[str]:
    return [str(ENVOY), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]


@contextlib.contextmanager
def gateway(name: str, service: str, folder: Path, proxies: int = 1) -> Iterator[tuple[str, int]]:
    """Run ``nginx`` or ``envoy`` in front of ``service`` (host:port), with its files in ``folder``; its address.

    Args:
        proxies: as how many nginx sees the one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host, service_port = service.split(":")
    if name == "nginx":
        text = (GATEWAYS / "nginx.conf").read_text(encoding="utf-8")
        changes = {f"server {SERVICE};": f"server {service};" * proxies, "listen 8080;": f"listen 127.0.0.1:{port};",
                   "/tmp/nginx.pid": str(folder / "nginx.pid")}  # fmt: skip
        command = nginx_command
    else:
        text = (GATEWAYS / "envoy.yaml").read_text(encoding="utf-8")
        changes = {"{address: 127.0.0.1, port_value: 8000}": f"{{address: {host}, port_value: {service_port}}}",
                   "{address: 0.0.0.0, port_value: 8080}": f"{{address: 127.0.0.1, port_value: {port}}}"}  # fmt: skip
        command = envoy_command
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    config = folder / {"nginx": "nginx.conf", "envoy": "envoy.yaml"}[name]
    config.write_text(text, encoding="utf-8")
    process = subprocess.Popen(command(config))
    try:
        until = time.monotonic() + 30
        while not _listens(port):
            assert process.poll() is None, f"{name} ended"
            assert time.monotonic() < until
            time.sleep(0.05)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
