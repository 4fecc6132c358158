"""flux-tiny served on this machine, with its files in a folder of its own that faults can damage."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.chaos.faults import WEIGHTS, Served
from scripts.envoy import envoy
from scripts.serve_process import ROOT, DemoError, Service, check_port

CONFIG = ROOT / "deployments" / "flux-tiny.yaml"
LOG = ROOT / "out" / "chaos.log"
START_S = 300.0
DISK_MB = 128

Placement = Literal["api", "cpu"]
PARTS = {"rank": 4, "coordinator": 2, "replica": 1, "api": 2, "proxy": 1, "controller": 1}
"""Processes of the service by name of the victim, those of the spare group among them."""
PLACED: dict[Placement, dict[str, int]] = {"api": {}, "cpu": {"encoder": 2, "decoder": 2}}
"""Those of the text encoders and the VAE."""


@contextmanager
def files() -> Iterator[Path]:
    """A folder with a copy of the model, and as root with two small file systems."""
    with tempfile.TemporaryDirectory(prefix="chaos", dir="/tmp") as name:  # short, since Ray's sockets are below it
        folder = Path(name)
        shutil.copytree(ROOT / "models" / "flux-tiny", folder / "model", ignore=shutil.ignore_patterns("*.png", "*.md"))
        for disk in ("ray", "profiles"):
            (folder / disk).mkdir()
        mounted = [folder / disk for disk in ("ray", "profiles") if os.geteuid() == 0 and _mount(folder / disk)]
        try:
            yield folder
        finally:
            for disk_path in mounted:
                subprocess.run(["umount", "-l", str(disk_path)], check=True)


def has_small_disks(folder: Path) -> bool:
    """Whether both file systems of `files` are there, so that one can be filled."""
    return all((folder / disk).is_mount() for disk in ("ray", "profiles"))


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def serving(folder: Path, placement: Placement, port: int) -> Iterator[Served]:
    """The service, ready; ends with all of its processes gone.

    Args:
        placement: of text encoders and VAE.

    Raises:
        DemoError: it does not start.
    """
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    settings: dict[str, Any] = config["applications"][0]["args"]
    settings |= {"model": str(folder / "model"), "spare_group": True, "api_replicas": 2}
    settings["cpus_per_helper"] = 0.1  # room for all of them, and their successors
    for part in ("text_encoder", "vae"):
        settings[part] |= {"placement": placement, "replicas": 2}  # where they are in the API's, it has two itself
    settings["magcache"]["profile"] = "flux-tiny"  # the copy's folder has another name
    settings["magcache"]["profile_dir"] = str(folder / "profiles")
    check_port("127.0.0.1", port)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["env", f"RAY_TMPDIR={folder / 'ray'}", sys.executable, "-m", "app.serve", str(path)]
    service = Service(command, f"http://127.0.0.1:{port}", LOG)
    try:
        service.start()
        until = time.monotonic() + START_S
        while not service.ready():
            service.check()
            if time.monotonic() > until:
                raise DemoError(f"the service is not ready after {START_S:g} s; {LOG} has its log")
            time.sleep(0.5)
        yield Served(service, folder, PARTS | PLACED[placement])
    finally:
        service.stop()


@contextmanager
def behind(through: str, served: Served) -> Iterator[str]:
    """Where clients reach the service: at its own URL, or ``through`` is ``envoy`` at Envoy's."""
    if not through:
        yield served.service.url
        return
    with envoy(served.service.url.removeprefix("http://"), served.folder) as (host, port):
        yield f"http://{host}:{port}"


def refusal_of_nan(folder: Path, port: int) -> str | None:
    """What the start says of a weight that is NaN; None when it serves all the same."""
    path = folder / "model" / WEIGHTS
    whole = path.read_bytes()
    tensors = load_file(path)
    tensors["proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    try:
        with contextlib.suppress(DemoError), serving(folder, "api", port):
            return None
        return LOG.read_text(errors="replace")
    finally:
        path.write_bytes(whole)
