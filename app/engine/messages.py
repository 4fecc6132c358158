"""Messages between the API, the coordinator and the ranks: frozen, plain data, units in the names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

COND = "cond"
UNCOND = "uncond"


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the text encoders make of one prompt.

    Attributes:
        tokens: (text_tokens, joint_attention_dim), the T5 output, padding included.
        pooled: (pooled_projection_dim,), the CLIP pooled output.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class MagCacheOptions:
    """One request's MagCache settings; ``None`` takes the profile's or the server's value.

    ``computed_steps`` asks for the best plan with so many computed steps, and leaves no say to a threshold.
    """

    enabled: bool = True
    mag_threshold: float | None = None
    mag_max_skip_steps: int | None = None
    mag_retention_ratio: float | None = None
    computed_steps: int | None = None


@dataclass(frozen=True)
class DenoiseJob:
    """One picture to denoise. ``row_id`` is unique in the service and begins with ``<request id>/``.

    True CFG, with its second branch, runs when ``true_cfg_scale`` is above 1, as in diffusers.
    """

    row_id: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    seed: int
    magcache: MagCacheOptions = MagCacheOptions()

    @property
    def request_id(self) -> str:
        """The id of the HTTP request that the picture belongs to."""
        return self.row_id.partition("/")[0]

    @property
    def branches(self) -> tuple[str, ...]:
        """The CFG branches that each step evaluates."""
        return (COND, UNCOND) if self.true_cfg_scale > 1.0 else (COND,)


@dataclass(frozen=True)
class Conditioning:
    """The tensors of one job; ``negative`` is there exactly when true CFG runs."""

    prompt: PromptEmbeddings
    negative: PromptEmbeddings | None = None


@dataclass(frozen=True)
class BranchStep:
    """What one CFG branch of a row does at one step.

    ``weights`` are empty when the branch computes; else the factors of its last computed residuals, newest first.
    ``history`` is how many computed residuals the branch has to keep afterwards for its later reuse.
    """

    branch: str
    compute: bool
    weights: tuple[float, ...] = ()
    history: int = 1


@dataclass(frozen=True)
class RowStep:
    """One row's part of a plan: take step ``step`` with a decision per branch; ``last`` returns its latents."""

    row_id: str
    step: int
    branches: tuple[BranchStep, ...]
    last: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One tick for all ranks: first drop rows, then admit rows, then step rows.

    ``digest`` hashes this plan and all before it, so a rank that missed or altered one cannot go on unnoticed.
    The admitted jobs' conditioning tensors travel beside the plan, in the order of ``admit``.
    """

    sequence: int
    digest: str
    admit: tuple[DenoiseJob, ...] = ()
    rows: tuple[RowStep, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """A rank's answer to one plan; ``latents`` holds finished rows, each (image_tokens, channels), on rank 0 only."""

    rank: int
    sequence: int
    digest: str
    seconds: float
    residual_bytes: int
    latents: dict[str, torch.Tensor]


FIRST_DIGEST = "0" * 16


def plan_digest(previous: str, plan: StepPlan) -> str:
    """The digest that ``plan`` must carry when the history so far has ``previous``; its own does not count."""
    content = plan.sequence, plan.admit, plan.rows, plan.drop
    return hashlib.blake2b(f"{previous}{content!r}".encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class DenoiseReport:
    """How one picture was denoised: MagCache schedule per CFG branch, and seconds by phase."""

    schedule: str
    computed: int
    skipped: int
    predicted_error: float
    negative_schedule: str | None
    queue_seconds: float
    denoise_seconds: float
    batch_rows_mean: float


@dataclass(frozen=True)
class DenoiseResult:
    """Finished latents, (image_tokens, channels) packed as diffusers' FluxPipeline packs them, and their report."""

    latents: torch.Tensor
    report: DenoiseReport
