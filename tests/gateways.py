"""nginx and Envoy with the configurations in deployments/gateways, in front of a service, on free ports."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from scripts.envoy import GATEWAYS, envoy, replaced, running
from scripts.serve_process import free_port
from tests.ops.needs import missing

SERVICE = "127.0.0.1:8000"  # where the configurations expect it


@contextlib.contextmanager
def nginx(service: str, folder: Path, proxies: int) -> Iterator[tuple[str, int]]:
    """Run nginx in front of ``service`` (host:port), with its files in ``folder``; its address."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") or missing(
        "nginx is not installed (Debian's package nginx-light)"
    )
    port, config = free_port(), folder / "nginx.conf"
    changes = {
        f"server {SERVICE};": f"server {service};" * proxies,
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "/tmp/nginx.pid": str(folder / "nginx.pid"),
    }
    config.write_text(replaced((GATEWAYS / "nginx.conf").read_text(encoding="utf-8"), changes), encoding="utf-8")
    with running([program, "-c", str(config), "-g", "daemon off;"], port):
        yield "127.0.0.1", port


@contextlib.contextmanager
def gateway(name: str, service: str, folder: Path, proxies: int = 1) -> Iterator[tuple[str, int]]:
    """Run ``nginx`` or ``envoy`` in front of ``service`` (host:port), with its files in ``folder``; its address.

    Args:
        proxies: as how many nginx sees the one.
    """
    with envoy(service, folder) if name == "envoy" else nginx(service, folder, proxies) as address:
        yield address
