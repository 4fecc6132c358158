"""Findings as a file's content: whole or not taken, and only of a job that measures the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from app.control.findings import Findings, from_bytes, to_bytes
from app.messages.calibration import CalibrationJob
from magcache_core.run_sums import RunMeasurement

JOB = CalibrationJob("calibration-1", ("a", "b"), 6, 64, 64, 3.5, 3, (3, 5))


def findings() -> Findings:
    measurement = RunMeasurement([1.0, 0.5, 0.0])
    for _ in range(2):
        measurement.add(torch.ones(1, 4, 6), torch.ones(1, 4, 3), lambda residual: residual[..., :3])
    return Findings(
        1,
        {"cond": measurement.sums},
        {1: 0.5},
        {1: 0.75},
        {("C.", "linear"): [0.1, 0.2]},
        {("C.", "linear"): [0.3]},
        4,
        2.5,
    )


def test_what_is_written_is_read_back() -> None:
    written = findings()
    read = from_bytes(to_bytes(written, JOB), replace(JOB, id="another", budget_s=9.0, budgets=(4,), trial_runs=1))
    assert read is not None
    assert replace(read, sums={}) == replace(written, sums={})
    (before,), (after,) = written.sums.values(), read.sums.values()
    assert torch.equal(after.gram, before.gram)
    assert torch.equal(after.moved, before.moved)
    assert torch.equal(after.segments["linear"], before.segments["linear"])
    assert from_bytes(to_bytes(Findings(), JOB), JOB) == Findings()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": ("a",)},
        {"steps": 7},
        {"width": 80},
        {"guidance_scale": 1.0},
        {"negative_prompt": "", "true_cfg_scale": 2.0},
        {"judge_runs": 1},
    ],
)
def test_those_of_another_measurement_are_not_taken(changes: dict[str, Any]) -> None:
    assert from_bytes(to_bytes(findings(), JOB), replace(JOB, **changes)) is None


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_nor_are_damaged_ones(kept: int) -> None:
    assert from_bytes(to_bytes(findings(), JOB)[:kept], JOB) is None


def test_the_phase_is_that_of_the_newest() -> None:
    assert [Findings().phase, Findings(ended={1: 0.5}).phase, findings().phase] == ["record", "probe", "try"]
