"""The benchmark of collectives runs on the engine as it is: two ranks, joined sums and separate ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.collectives import CASES


@pytest.mark.bench
def test_both_ways_are_measured_in_every_case(tmp_path: Path) -> None:
    out = tmp_path / "collectives.json"
    command = [sys.executable, "-m", "benchmarks.collectives", "--rounds", "1", "--warm-up", "0", "--out", str(out)]
    subprocess.run(command, check=True, timeout=840)
    cases = json.loads(out.read_text())["cases"]
    assert [(case["rows"], case["side"]) for case in cases] == list(CASES)
    assert all(case["joined_ms"] > 0 and case["separate_ms"] > 0 for case in cases)
