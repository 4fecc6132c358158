"""What a calibration's runs have shown so far: kept in a file, so that it goes on after an interruption."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from app.messages.calibration import CalibrationJob
from magcache_core.run_sums import BranchSums


@dataclass
class Findings:
    """What the runs so far have shown.

    Attributes:
        recorded: runs in ``sums``.
        sums: of the recorded runs, by CFG branch.
        moved, ended: by probed step, how far reuse there moved the latents of the first run after that step and at the
            end; 2-norms.
        errors: by schedule and reuse mode, how far the image of each run was from the uncached one.
        judged: the same of the held-out runs, which decide between the closest.
        runs: images that were run.
        seconds: time of these runs.
    """

    recorded: int = 0
    sums: dict[str, BranchSums] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    errors: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    judged: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    runs: int = 0
    seconds: float = 0.0

    @property
    def phase(self) -> str:
        """``record``, ``probe`` or ``try``: what they are of, newest first."""
        return "try" if self.errors else "probe" if self.ended else "record"


def to_bytes(findings: Findings, job: CalibrationJob) -> bytes:
    """``findings`` of ``job`` as a file's content: plain values and tensors, which are safe to read."""
    document: dict[str, Any] = {one.name: getattr(findings, one.name) for one in fields(Findings)}
    document["sums"] = {
        branch: {one.name: getattr(sums, one.name) for one in fields(BranchSums)}
        for branch, sums in findings.sums.items()
    }
    file = io.BytesIO()
    torch.save({"measured": _measured(job), **document}, file)
    return file.getvalue()


def from_bytes(content: bytes, job: CalibrationJob) -> Findings | None:
    """What `to_bytes` wrote, if it is whole and of a job that measures the same."""
    try:
        document: Mapping[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None
    if document.get("measured") != _measured(job):
        return None
    kept = {one.name: document[one.name] for one in fields(Findings)}
    return Findings(**{**kept, "sums": {branch: BranchSums(**sums) for branch, sums in kept["sums"].items()}})


def _measured(job: CalibrationJob) -> str:
    """What decides the figures; another job may ask for more trials of the same or for more time."""
    guidance = job.guidance_scale, job.negative_prompt, job.true_cfg_scale
    decides = job.prompts, job.judge_runs, job.steps, job.width, job.height, *guidance
    return hashlib.sha256(repr(decides).encode()).hexdigest()
