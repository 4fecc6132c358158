"""Prometheus as a child process with the rules of k8s/, and queries to it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from scripts.serve_process import free_port, open_url

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "k8s/prometheus.yml"
_PATIENCE_S = 120.0


class PrometheusError(Exception):
    """An error to show to the user."""


def config_for(target: str, *, ray_target: str | None = None, interval_s: float | None = None) -> dict[str, Any]:
    """k8s/prometheus.yml for a service at another address.

    Args:
        target: ``host:port`` of the service.
        ray_target: the same of one Ray node's metrics, in place of Ray's own list of its nodes.
        interval_s: time between scrapes, and between evaluations of the rules.
    """
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["rule_files"] = [str((CONFIG.parent / path).resolve()) for path in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["flux"]["static_configs"][0]["targets"] = [target]
    if ray_target is not None:
        del jobs["ray"]["file_sd_configs"]
        jobs["ray"]["static_configs"] = [{"targets": [ray_target]}]
    if interval_s is not None:
        config["global"] = dict.fromkeys(config["global"], f"{interval_s:g}s")
    return config


class Prometheus:
    """One Prometheus process; a context manager that stops it at the end of the block."""

    def __init__(self, config: dict[str, Any], folder: Path, port: int | None = None) -> None:
        """``folder`` takes the config, the data and the log; without ``port`` a free one is taken."""
        self._folder = folder
        self._config = config
        self._port = port or free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        program = shutil.which("prometheus")
        if program is None:
            raise PrometheusError("prometheus is not installed: on Debian, `apt-get install prometheus`")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(self._config, sort_keys=False), encoding="utf-8")
        with (self._folder / "prometheus.log").open("wb") as log:
            self._child = subprocess.Popen(
                [
                    program,
                    f"--config.file={path}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    "--enable-feature=exemplar-storage",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait(self) -> None:
        """Block until the process ends."""
        assert self._child is not None
        self._child.wait()

    def _wait_until_ready(self) -> None:
        assert self._child is not None
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            if self._child.poll() is not None:
                break
            with contextlib.suppress(OSError), open_url(f"{self.url}/-/ready", 2):
                return
            time.sleep(0.1)
        log = (self._folder / "prometheus.log").read_text(encoding="utf-8", errors="replace").splitlines()
        raise PrometheusError("prometheus did not come up:\n" + "\n".join(log[-10:]))

    def _stop(self) -> None:
        assert self._child is not None
        self._child.terminate()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def ask(url: str, path: str, **parameters: str | float) -> Any:
    """Query Prometheus and return the ``data`` of its answer.

    Raises:
        PrometheusError: the query was refused, for example because it does not parse.
    """
    query = f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with open_url(query, 30) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as error:
        raise PrometheusError(f"{parameters}: {error.read().decode(errors='replace')[:500]}") from None
