"""What comes back: of a group that starts, of a plan, of an image under way, of a finished one."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field

import torch

from magcache_core.run_sums import BranchSums

Latents = torch.Tensor | Awaitable[torch.Tensor]
"""(image_tokens, channels), packed as diffusers' pipelines pack them; large ones as a reference that gives them when it
is awaited, so that only the process that decodes them opens them."""


@dataclass(frozen=True)
class GroupStart:
    """How far a starting group is.

    Attributes:
        replica: its replica's unique name.
        phase: what it does, in words for the operator.
        read_bytes: what each rank has read, or downloaded and written, since it began to load.
        checkpoint_bytes: the size of the transformer's files, of which a rank reads its part; 0 before it is known.
    """

    replica: str
    phase: str
    read_bytes: tuple[int, ...] = ()
    checkpoint_bytes: int = 0


@dataclass(frozen=True)
class StepResult:
    """A rank's result of one plan.

    ``latents`` holds finished rows, ``previews`` the x0 estimates asked for, and ``sums`` what was measured of finished
    rows that were recorded, by branch; by row id and on rank 0 only.
    ``idle_seconds`` is how long the rank waited for this plan while it held rows to step.
    """

    rank: int
    sequence: int
    digest: str
    seconds: float
    residual_bytes: int
    latents: Mapping[str, Latents]
    previews: Mapping[str, Latents] = field(default_factory=dict)
    idle_seconds: float = 0.0
    sums: Mapping[str, Mapping[str, BranchSums]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTime:
    """``seconds`` of one step of ``rows`` equal rows that all compute, or all reuse."""

    rows: int
    compute: bool
    seconds: float


@dataclass(frozen=True)
class Progress:
    """The progress of image ``index`` of a request.

    Attributes:
        step: steps done, 0 while it waits.
        steps: steps in all.
        decision: ``C`` or ``.`` of the last step done, empty while it waits.
        eta_s: estimated seconds to the last step.
        queue_position: its place in the queue, from 1; 0 once it runs.
        preview: x0 estimate, or None.
        schedule: one character per step, ``C`` or ``.``, of what is done and of what is to come. Until the image is
            admitted, a deadline or load may still lower it.
        negative_schedule: the same of the negative branch; None without true CFG.
        predicted_error: of ``schedule``; infinite where a reuse is longer than any that the profile measured.
    """

    index: int
    step: int
    steps: int
    decision: str
    eta_s: float
    queue_position: int
    preview: Latents | None = None
    schedule: str = ""
    negative_schedule: str | None = None
    predicted_error: float = 0.0


@dataclass(frozen=True)
class DenoiseReport:
    """How one image was denoised: MagCache schedule per CFG branch, and seconds by phase.

    Attributes:
        eta_seconds: the estimate at its arrival, queue included.
        queue_position: its place in the queue at its arrival, from 1; 0 when there was room at once.
        lowered_by: ``deadline`` or ``load`` when computed steps were lowered for it, else None.
        uncached_reason: why all steps were computed although MagCache was enabled, else None.
        profile: ``NAME@VERSION`` of the profile that the schedule was planned with; None without one.
        predicted_psnr_db: mean PSNR that such images are expected to have; None where it is not known.
        floor_db: what the trials of this number of computed steps reached, where it was chosen for that; else None.
        plan_reason: why the default was another one than the profile recommends, else None.
    """

    schedule: str
    computed: int
    skipped: int
    predicted_error: float
    negative_schedule: str | None
    queue_seconds: float
    denoise_seconds: float
    eta_seconds: float = 0.0
    queue_position: int = 0
    lowered_by: str | None = None
    uncached_reason: str | None = None
    profile: str | None = None
    predicted_psnr_db: float | None = None
    floor_db: float | None = None
    plan_reason: str | None = None


@dataclass(frozen=True)
class DenoiseResult:
    """Finished latents and their report; ``sums`` by branch where the row was recorded."""

    latents: Latents
    report: DenoiseReport
    sums: Mapping[str, BranchSums] = field(default_factory=dict)
