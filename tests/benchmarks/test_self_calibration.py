"""The table of docs/calibration.md is the kept result."""

from __future__ import annotations

import json

import pytest

from benchmarks.self_calibration import DOCUMENT, RESULTS, latencies, table


def test_the_document_has_the_kept_result() -> None:
    made = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert made in DOCUMENT.read_text(encoding="utf-8"), "run python -m benchmarks.self_calibration --write"


def test_latencies_have_their_percentiles() -> None:
    found = latencies([float(number) for number in range(1, 101)])
    assert found["images"] == 100
    assert (found["p50_s"], found["p95_s"]) == pytest.approx((50.5, 95.05))
