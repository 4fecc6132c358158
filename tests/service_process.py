"""``python -m app.serve`` with flux-tiny as a process of its own, on a free port and with a Ray of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from scripts.serve_process import LATE, TRIES, free_port
from tests.patience import ANSWER_S, wait_for

ROOT = Path(__file__).parent.parent
START_S = 600.0
"""All processes of a service start within this time, beside other tests on a slow machine."""


@dataclass(frozen=True)
class ServiceProcess:
    """The running process, a client of its service, and the file that it logs to."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def health(self) -> int:
        """The status of /health; 0 while nothing listens."""
        try:
            return self.client.get("/health").status_code
        except httpx.TransportError:
            return 0

    def is_up_or_ended(self) -> bool:
        """Whether it is ready, or will never be."""
        return self.health() == 200 or self.process.poll() is not None

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def processes(self) -> list[psutil.Process]:
        """What runs of it: Ray's processes stay in the session of the one that started them."""
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(each.pid) == self.process.pid and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return found


@contextmanager
def service_process(folder: Path, **settings: object) -> Iterator[ServiceProcess]:
    """Start it with ``settings`` and wait until it is ready; it leaves nothing running. Its files are in ``folder``."""
    port = free_port()
    config = yaml.safe_load((ROOT / "deployments/flux-tiny.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= settings
    path, log = folder / "config.yaml", folder / "log"
    path.write_text(yaml.safe_dump(config))
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S) as client:
        for tries_left in reversed(range(TRIES)):
            process = subprocess.Popen(
                [sys.executable, "-m", "app.serve", str(path), "--address", "local"],
                cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            service = ServiceProcess(process, client, log)
            try:
                wait_for(service.is_up_or_ended, "it is ready", START_S)
                said = log.read_text()
                if process.poll() is None:
                    yield service
                    return
            finally:
                for left in service.processes():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
                process.wait()
            if not tries_left or LATE not in said:  # else Ray, beside other tests, is started again
                pytest.fail(f"it ended with code {process.returncode}:\n{said}")
