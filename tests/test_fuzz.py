"""Schemathesis against the running service: what `openapi.json` describes is answered as it says. Then its GCS dies."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.patience import wait_for
from tests.service_process import ROOT, ServiceProcess, service_process

pytestmark = pytest.mark.faults

SMALLEST = {
    "default_width": 64, "default_height": 64, "num_inference_steps": 1, "max_sequence_length": 32,
    "min_side": 64, "max_side": 64, "max_pixels": 4096, "max_inference_steps": 2, "max_n": 1,
}  # fmt: skip
"""Limits under which a valid request makes the smallest image that the service offers."""
ANSWER_S = 5.0
"""More than an API process takes (2 s), and far less than Ray's own minute; for a busy machine."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with service_process(tmp_path_factory.mktemp("fuzz"), tensor_parallel_size=1, sampling=SMALLEST) as service:
        yield service


def test_two_thousand_requests_find_nothing(service: ServiceProcess) -> None:
    address = f"{str(service.client.base_url).rstrip('/')}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", address, "--seed", "1", "--no-color"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = f"{found.stdout[-6000:]}\n{found.stderr[-2000:]}"
    assert found.returncode == 0, said
    (cases,) = re.findall(r"(\d+) generated, (\d+) passed", found.stdout)
    assert cases[0] == cases[1]
    assert int(cases[0]) >= 2000, said
    assert service.health() == 200


# Last, since Ray ends without its GCS.
def test_coordinators_are_asked_without_the_gcs_that_looks_them_up(service: ServiceProcess) -> None:
    assert service.metric("flux_running_pictures") == 0
    (gcs,) = [each for each in service.processes() if each.name() == "gcs_server"]
    gcs.send_signal(signal.SIGKILL)
    wait_for(lambda: not gcs.is_running() or gcs.status() == psutil.STATUS_ZOMBIE, "the GCS is gone")
    with httpx.Client(base_url=service.client.base_url, timeout=ANSWER_S) as client:
        for _ in range(3):
            health = client.get("/health")
            assert (health.status_code, health.json()["details"]["groups_ready"]) == (200, 1)
            assert "flux_running_pictures{" in client.get("/metrics").text
