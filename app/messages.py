"""Messages between the API, the coordinator and the ranks: frozen plain data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from magcache_core.run_sums import BranchSums

Latents = torch.Tensor | Awaitable[torch.Tensor]
"""(image_tokens, channels), packed as diffusers' pipelines pack them; large ones as a reference that gives them when it
is awaited, so that only the process that decodes them opens them."""

COND = "cond"
UNCOND = "uncond"


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a prompt, and how many of them are read; ``clip`` is CLIP's own count, 0 where there is none."""

    given: int
    read: int
    clip_given: int = 0
    clip_read: int = 0


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt, encoded by the text encoders.

    Attributes:
        tokens: (text_tokens, joint_attention_dim), the output of T5 or Qwen3, padding included.
        pooled: (pooled_projection_dim,), the CLIP pooled output; None for FLUX.2, which has no such input.
        count: of the prompt's tokens.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None
    count: TokenCount = TokenCount(0, 0)


@dataclass(frozen=True)
class SourceImage:
    """An image that a request starts from or refers to, as latents of the VAE.

    Attributes:
        latents: (image_tokens, channels), packed and scaled as the model's diffusers pipeline does.
        width, height: pixels.
        mask: (height / 8, width / 8), bool, one for each latent of the VAE: True where inpainting paints, and elsewhere
            this image stays. None for images that are no source of inpainting.
    """

    latents: torch.Tensor
    width: int
    height: int
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class ImageKind:
    """Images that the quality guard holds to one number of computed steps.

    Attributes:
        profile: ``NAME@VERSION`` of the profile that plans them.
        steps: denoising steps.
        guided: whether true CFG runs.
    """

    profile: str
    steps: int
    guided: bool


@dataclass(frozen=True)
class MagCacheOptions:
    """One request's MagCache settings; ``None`` takes the profile's or the server's value.

    ``computed_steps`` asks for the best plan with that many computed steps; the threshold is then ignored.
    ``computed_share`` asks for that share of the steps, or for the fewest that the other settings allow if more.
    ``floor_db`` goes before it: the fewest steps whose trials reached this mean PSNR, where there are such trials.
    ``min_computed_steps`` is the fewest that a deadline or load may lower the computed steps to.
    ``client_chose``: the request names its schedule itself, which is lowered only as far as it allows.
    ``guard_budgets``: computed steps that the quality guard chose, by kind of image; each other kind has its own.
    """

    enabled: bool = True
    mag_threshold: float | None = None
    mag_max_skip_steps: int | None = None
    mag_retention_ratio: float | None = None
    computed_steps: int | None = None
    min_computed_steps: int | None = None
    computed_share: float | None = None
    floor_db: float | None = None
    client_chose: bool = False
    guard_budgets: tuple[tuple[ImageKind, int], ...] = ()


@dataclass(frozen=True)
class CalibrationRun:
    """What a row in the background does: a calibration's, or the quality guard's. It steps only while there is no
    client's image.

    Attributes:
        schedule: one character per step, ``C`` computes, ``.`` reuses.
        reuse: how reused steps are filled in, one of `magcache_core.REUSE_MODES` but ``fitted``.
        record: its steps are measured (`magcache_core.run_sums`); all of them compute.
    """

    schedule: str
    reuse: str = "residual"
    record: bool = False


@dataclass(frozen=True)
class CalibrationJob:
    """What to calibrate, and how long that may take.

    Attributes:
        prompts: all run from noise of seed 0; all but the last ``judge_runs`` are recorded.
        guidance_scale: distilled guidance.
        computed_steps: what the profile recommends.
        budgets: numbers of computed steps to try schedules for, the most important first.
        trial_runs: how many of the recorded prompts each schedule is tried on.
        moves: schedules to try beside the candidates of each number of computed steps.
        budget_s: seconds of its runs, waits for clients' images included, after which it ends with what it has.
        negative_prompt: of all runs, where true CFG runs; else None.
        true_cfg_scale: 1 where it does not run.
        judge_runs: how many of the last prompts decide between the schedules that came closest; 0 for none.
        floors_db: mean PSNRs for which the fewest computed steps are looked for, after ``budgets``.
    """

    id: str
    prompts: tuple[str, ...]
    steps: int
    width: int
    height: int
    guidance_scale: float
    computed_steps: int
    budgets: tuple[int, ...]
    trial_runs: int = 4
    moves: int = 6
    budget_s: float = 1800.0
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    judge_runs: int = 0
    floors_db: tuple[float, ...] = ()

    @property
    def recorded_prompts(self) -> tuple[str, ...]:
        """Those of the recorded runs."""
        return self.prompts[: len(self.prompts) - self.judge_runs]


@dataclass(frozen=True)
class CalibrationStatus:
    """How far a calibration is.

    Attributes:
        state: ``running``, ``done``, ``cancelled`` or ``failed``.
        phase: ``record``, ``probe`` or ``try``: what it runs now, or ran last.
        runs: images that it has run, those before an interruption included.
        expected_runs: how many it will have run at its end, as far as that is known.
        seconds: time of these runs.
        profile: ``NAME@VERSION`` once it is done.
        message: what made it fail.
    """

    id: str
    state: Literal["running", "done", "cancelled", "failed"]
    phase: str
    runs: int
    expected_runs: int
    seconds: float
    profile: str | None = None
    message: str | None = None

    @property
    def progress(self) -> float:
        """Share of its runs that are done; 1 once it is done, and not before."""
        return 1.0 if self.state == "done" else min(self.runs / self.expected_runs, 0.999)


def first_step(steps: int, strength: float | None) -> int:
    """The first step of image-to-image in a schedule of ``steps``; diffusers skips the same ones."""
    return 0 if strength is None else min(int(max(steps - steps * strength, 0)), steps - 1)


def steps_of_share(share: float, steps: int) -> int:
    """The fewest of ``steps`` that are at least ``share`` of them, whatever a float's last digits say."""
    return math.ceil(share * steps - 1e-9)


@dataclass(frozen=True)
class Reservation:
    """A request that may come again.

    Attributes:
        token: drawn for it; its repetitions have the same.
        body: a digest of its body and of its API key's name.
        seed: of its first image.
        made_s: Unix time of its arrival.
    """

    token: str
    body: str
    seed: int
    made_s: float


@dataclass(frozen=True)
class Sharing:
    """How a repetition finds the images of a request.

    Attributes:
        token, body, seed, made_s: see `Reservation`.
        process: the API process that the request came to.
        keyed: it has an Idempotency-Key: its client may come again after it has left.
    """

    token: str
    body: str
    seed: int
    made_s: float
    process: str
    keyed: bool

    def image(self, index: int) -> str:
        """The name of the request's image ``index``, unique in the service."""
        return f"{self.token}/{index}"


@dataclass(frozen=True, order=True)
class LoraUse:
    """One low-rank adapter that a row's transformer has, ``scale`` times; 0 leaves it out, and it may be negative.

    Attributes:
        name: of its file in the folder of adapters, without ``.safetensors``.
        digest: of that file's content (`app.engine.lora_files.lora_digest`), which ranks compare; empty for any.
        nbytes: the memory that it takes on a rank at most.
    """

    name: str
    scale: float
    digest: str = ""
    nbytes: int = 0

    @property
    def content(self) -> tuple[str, str]:
        """Name and digest: a file that is replaced under the same name is another adapter."""
        return self.name, self.digest


@dataclass(frozen=True)
class LoraFile:
    """An adapter of the folder that the setting ``loras`` names.

    Attributes:
        name: its path in the folder without the suffix.
        digest: of the file's content.
        rank: the largest of its matrices' ranks.
        nbytes: the memory that it takes on a rank at most.
    """

    name: str
    digest: str
    rank: int
    nbytes: int


@dataclass(frozen=True)
class LoraListing:
    """The adapters that a folder offers, by name, and the files in it that are refused, with the reason."""

    offered: Mapping[str, LoraFile] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DenoiseJob:
    """One image to denoise, number ``index`` of its HTTP request. ``row_id`` is unique in the service.

    True CFG, with its second branch, runs when ``true_cfg_scale`` is above 1, as in diffusers.

    Attributes:
        priority: higher goes first.
        deadline_s: seconds from the job's arrival at the coordinator to its last step; None for no deadline.
        partial_images: number of previews (x0 estimates), evenly spread over the steps.
        strength: image-to-image, in (0, 1]: the share of the steps that run on the source; None starts from noise.
        key_name: the name of the API key that the request came with; empty where the service has none.
        retry_key: equal for an image and its repetition in a later request; empty where that is not known.
        sharing: how a repetition of the request finds the image; None where none may.
        computing: the steps that compute in some branch, counted from the job's first; None when any of them may.
        source_tokens: tokens of the reference images, which every step reads beside the image's own.
        calibration: what the row does instead of following ``magcache``, where it is in the background.
        loras: adapters of the transformer, which add up; each name once.
    """

    row_id: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    seed: int
    magcache: MagCacheOptions = MagCacheOptions()
    request_id: str = ""
    index: int = 0
    priority: int = 0
    deadline_s: float | None = None
    partial_images: int = 0
    strength: float | None = None
    source_tokens: int = 0
    key_name: str = ""
    retry_key: str = ""
    sharing: Sharing | None = None
    computing: tuple[int, ...] | None = None
    calibration: CalibrationRun | None = None
    loras: tuple[LoraUse, ...] = ()

    @property
    def first_step(self) -> int:
        """The step of the whole schedule at which this job begins."""
        return first_step(self.num_inference_steps, self.strength)

    @property
    def steps_to_run(self) -> int:
        """Number of steps of this job: all, or with ``strength`` those from `first_step` on."""
        return self.num_inference_steps - self.first_step

    @property
    def is_recorded(self) -> bool:
        """Whether its steps are measured for a calibration."""
        return self.calibration is not None and self.calibration.record

    @property
    def branches(self) -> tuple[str, ...]:
        """The CFG branches that each step evaluates."""
        return (COND, UNCOND) if self.true_cfg_scale > 1.0 else (COND,)


@dataclass(frozen=True)
class Conditioning:
    """The tensors of one job; ``negative`` is set exactly when true CFG runs.

    ``sources`` are the images that an edit refers to (Kontext, klein), or the one that ``strength`` starts from.
    ``grams`` are, for a row that is recorded, the inner products of the residuals of the runs before, by branch; see
    `magcache_core.row_sums.RowMeasurement`.
    """

    prompt: PromptEmbeddings
    negative: PromptEmbeddings | None = None
    sources: tuple[SourceImage, ...] = ()
    grams: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def token_counts(self) -> tuple[TokenCount, ...]:
        """Of the prompt, and of the negative one if there is one."""
        return tuple(prompt.count for prompt in (self.prompt, self.negative) if prompt is not None)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        prompts = [prompt for prompt in (self.prompt, self.negative) if prompt is not None]
        tensors = [prompt.tokens for prompt in prompts] + [source.latents for source in self.sources]
        tensors += [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        tensors += [source.mask for source in self.sources if source.mask is not None]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class BranchStep:
    """What one CFG branch of a row does at one step.

    ``weights`` are empty when the branch computes; else the factors of its last computed residuals, newest first, or
    none where the row's velocities are reused and nothing runs.
    ``residuals_kept`` is how many computed residuals the branch has to keep afterwards for its later reuse.
    """

    branch: str
    compute: bool
    weights: tuple[float, ...] = ()
    residuals_kept: int = 1

    @property
    def runs(self) -> bool:
        """Whether the transformer, or its ends around a reused residual, run."""
        return self.compute or bool(self.weights)


@dataclass(frozen=True)
class RowStep:
    """One row in a plan: run ``step``, counted from the job's first, with a decision per branch.

    With ``last`` the result has its latents, with ``preview`` its x0 estimate at this step.

    A row that predicts and corrects velocities (`magcache_core.correct`) has factors of its last computed guided
    velocities, newest first: ``move``, at a computed step, of what is added to the latents for this step and the
    reused ones after it; and ``estimate``, at every step, of what is added to the latents for an x0 estimate.
    """

    row_id: str
    step: int
    branches: tuple[BranchStep, ...]
    last: bool = False
    preview: bool = False
    move: tuple[float, ...] = ()
    estimate: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """One plan for all ranks: first drop rows, then admit rows, then step rows.

    ``digest`` hashes this plan and all before it, which exposes a rank that missed a plan or got another one.
    The conditioning tensors of ``admit`` are sent beside the plan, in its order. A plan in the ``background`` steps a
    row of a calibration, and no client's image.
    """

    sequence: int
    digest: str
    admit: tuple[DenoiseJob, ...] = ()
    rows: tuple[RowStep, ...] = ()
    drop: tuple[str, ...] = ()
    background: bool = False


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


FIRST_DIGEST = "0" * 16


def plan_digest(previous: str, plan: StepPlan) -> str:
    """The digest of ``plan`` after a history with digest ``previous``; the plan's own digest field is ignored."""
    rows = ";".join(map(_row_text, plan.rows))
    content = f"{previous} {plan.sequence} {plan.admit!r} {plan.drop!r} {plan.background} {rows}"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def chained(plans: Iterable[StepPlan]) -> list[StepPlan]:
    """``plans`` as a complete history: numbered from 0, each with its digest."""
    made: list[StepPlan] = []
    digest = FIRST_DIGEST
    for sequence, plan in enumerate(plans):
        numbered = replace(plan, sequence=sequence)
        digest = plan_digest(digest, numbered)
        made.append(replace(numbered, digest=digest))
    return made


def _row_text(row: RowStep) -> str:
    # Ranks hash every plan between steps, and a dataclass's own repr takes five times as long.
    parts = ",".join(f"{b.branch} {b.compute} {b.weights} {b.residuals_kept}" for b in row.branches)
    return f"{row.row_id!r} {row.step} {row.last} {row.preview} {row.move} {row.estimate} {parts}"


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
