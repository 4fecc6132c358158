"""Schemathesis against the running service: what `openapi.json` describes is answered as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service_process import ROOT, service_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SMALLEST = {
    "default_width": 64, "default_height": 64, "num_inference_steps": 1, "max_sequence_length": 32,
    "min_side": 64, "max_side": 64, "max_pixels": 4096, "max_inference_steps": 2, "max_n": 1,
}  # fmt: skip
"""Limits under which a valid request makes the smallest image that the service offers."""


def test_two_thousand_requests_find_nothing(tmp_path: Path) -> None:
    with service_process(tmp_path, tensor_parallel_size=1, sampling=SMALLEST) as service:
        address = f"{str(service.client.base_url).rstrip('/')}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", address, "--seed", "1", "--no-color"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        said = f"{found.stdout[-6000:]}\n{found.stderr[-2000:]}"
        assert found.returncode == 0, said
        (cases,) = re.findall(r"(\d+) generated, (\d+) passed", found.stdout)
        assert cases[0] == cases[1]
        assert int(cases[0]) >= 2000, said
        assert service.health() == 200
