"""A job as a file's content: whole or not taken."""

from __future__ import annotations

import json

import pytest

from app.control.job_file import from_bytes, to_bytes
from app.messages.calibration import CalibrationJob

JOB = CalibrationJob(
    "calibration-1",
    ("a", "b\u00e9"),
    6,
    64,
    64,
    3.5,
    3,
    (3, 5),
    negative_prompt="",
    true_cfg_scale=4.0,
    floors_db=(28.0,),
)


def test_what_is_written_is_read_back() -> None:
    assert from_bytes(to_bytes(JOB)) == JOB


@pytest.mark.parametrize(
    "content", [b"", to_bytes(JOB)[:-9], b"[1]", b'"a"', json.dumps({"id": "a", "other": 1}).encode(), b"\xff"]
)
def test_a_damaged_one_or_another_versions_is_not(content: bytes) -> None:
    assert from_bytes(content) is None
