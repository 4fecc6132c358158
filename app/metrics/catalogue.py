"""Every metric of the service in one table: the instruments and docs/metrics.md are both made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal["api", "encoder", "guard", "calibration", "coordinator"]

# From the small model's tenths of a second on a CPU to a queue of FLUX.1-dev images.
LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0, 600.0)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
GAP = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
RATIO = tuple(tenth / 10 for tenth in range(11))
# The shipped thresholds are 0.05 to 0.24 for one run of reused steps, and an image adds up several runs.
ERROR = (0.0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DECIBELS = (10.0, 15.0, 20.0, 22.5, 25.0, 27.5, 30.0, 32.5, 35.0, 37.5, 40.0, 45.0, 50.0, 55.0, 60.0, 70.0)
SIMILARITY = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TOKENS = (96, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

OUTCOMES = ("ok", "invalid", "busy", "unavailable", "failed", "cancelled")
ERROR_CODES = (
    "busy", "client_left", "deadline_impossible", "deadline_passed", "generation_failed", "internal_error",
    "invalid_value", "model_not_found", "request_cancelled", "unavailable",
)  # fmt: skip
"""Codes whose series exist from the start; the other codes of invalid requests appear when they first occur."""
MAX_KEYS = 100
MAX_LORAS = 100
MAX_PROFILES = 100
OTHER = "other"
"""The label of the names beyond such a number."""
PHASES = ("queue", "encode", "denoise", "decode", "total")
CALIBRATION_PHASES = ("record", "probe", "try")
DECISIONS = ("computed", "reused")
BRANCHES = ("cond", "uncond")
DECILES = tuple(str(decile) for decile in range(10))

COMMON: Mapping[Owner, tuple[str, ...]] = MappingProxyType(
    {
        "api": ("model", "process"),
        "encoder": ("model", "process"),
        "guard": ("model", "process"),
        "calibration": ("model", "process"),
        "coordinator": ("model", "replica"),
    }
)
"""Labels that every metric of an owner carries."""


@dataclass(frozen=True)
class Spec:
    """One metric.

    Attributes:
        name: as prometheus_client takes it; a counter's series end in ``_total`` beside it.
        unit: what one unit of the value is.
        labels: beside the owner's common ones, each with all values that it takes. A label without values is a number
            that the deployment bounds (``rank``) or a version.
        buckets: upper bounds of a histogram.
        exemplars: whether buckets carry a ``request_id`` in OpenMetrics.
    """

    name: str
    kind: Kind
    owner: Owner
    unit: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    exemplars: bool = False

    @property
    def from_start(self) -> bool:
        """Whether every combination of its labels' values exists from the start: all are known, and all can occur."""
        return all(self.labels.values()) and "status_class" not in self.labels

    @property
    def series(self) -> str:
        """The name in queries; a histogram's series add ``_bucket``, ``_sum`` and ``_count``."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _counter(owner: Owner, name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Spec:
    return Spec(name, "counter", owner, unit, text, labels)


def _gauge(owner: Owner, name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Spec:
    return Spec(name, "gauge", owner, unit, text, labels)


def _histogram(
    owner: Owner,
    name: str,
    unit: str,
    buckets: tuple[float, ...],
    text: str,
    exemplars: bool = False,
    **labels: tuple[str, ...],
) -> Spec:
    return Spec(name, "histogram", owner, unit, text, labels, buckets, exemplars)


CATALOGUE: tuple[Spec, ...] = (
    # What the API counts.
    _counter(
        "api", "flux_requests", "requests",
        "Image requests by outcome and class of the HTTP status; a stream counts by its end.",
        outcome=OUTCOMES, status_class=("2xx", "4xx", "5xx"),
    ),
    _counter(
        "api", "flux_request_errors", "requests",
        "Image requests that ended without all their images, by the `code` in the reply; client_left has none.",
        code=ERROR_CODES,
    ),
    _counter(
        "api", "flux_key_requests", "requests",
        f"Image requests by the name of their API key and outcome, where there are keys; after {MAX_KEYS} names, which "
        f"a file that changes may exceed, new ones count as {OTHER!r}.",
        key=(), outcome=OUTCOMES,
    ),
    _counter(
        "api", "flux_pictures_joined", "images",
        "Images that a request which came again got from the one before, without being made again.",
    ),
    _counter(
        "api", "flux_lora_requests", "requests",
        "Image requests by the adapter that they name, once for each of several, and outcome; only names that the "
        f"folder offers are counted, and after {MAX_LORAS} of them new ones count as {OTHER!r}.",
        lora=(), outcome=OUTCOMES,
    ),
    _histogram(
        "api", "flux_request_duration_seconds", "seconds", LATENCY,
        "Time from an image request's arrival to its reply, by outcome.", exemplars=True, outcome=OUTCOMES,
    ),
    _histogram(
        "api", "flux_phase_duration_seconds", "seconds", LATENCY,
        "Time of one image in each phase; total is from the request's arrival to the finished file.",
        exemplars=True, phase=PHASES,
    ),
    _gauge(
        "api", "flux_build_info", "1", "Always 1; the labels say what runs.",
        version=(), torch=(), diffusers=(), ray=(),
    ),
    # What the prompt encoder counts.
    _counter(
        "encoder", "flux_prompt_cache_lookups", "prompts",
        "Prompts by where their embeddings came from: kept ones (hit), a computation under way for the same prompt "
        "(shared), or a new one (miss).",
        result=("hit", "shared", "miss"),
    ),
    # What the quality guard measures, of kinds of images: their profile, their steps, and whether true CFG runs.
    _gauge(
        "guard", "flux_guard_target_db", "dB",
        "PSNR against the uncached image that nine of ten images are to reach.",
    ),
    _histogram(
        "guard", "flux_guard_psnr_db", "dB", DECIBELS,
        "PSNR of a sampled image against its uncached one, by profile and computed steps.",
        profile=(), computed=(),
    ),
    _histogram(
        "guard", "flux_guard_ssim", "1", SIMILARITY,
        "Structural similarity of a sampled image to its uncached one, by profile and computed steps.",
        profile=(), computed=(),
    ),
    _gauge(
        "guard", "flux_guard_worst_tenth_db", "dB",
        "Estimate of the 10th percentile of an image's PSNR at the present budget; no value while too few are known.",
        profile=(), steps=(), guided=("false", "true"),
    ),
    _gauge(
        "guard", "flux_guard_budget_steps", "steps",
        "Computed steps of an image that leaves MagCache to the server, as the guard has chosen or left them.",
        profile=(), steps=(), guided=("false", "true"),
    ),
    _counter(
        "guard", "flux_guard_changes", "changes", "Changes of a budget by the guard.", direction=("up", "down"),
    ),
    _counter(
        "guard", "flux_guard_samples", "images",
        "Sampled images by what became of them: compared, dropped since newer ones waited, or failed to run again.",
        result=("compared", "dropped", "failed"),
    ),
    # What the API process counts that calibrates.
    _gauge(
        "calibration", "flux_calibration_progress", "share",
        "Share of a calibration's runs that are done, those before an interruption included, by the profile that it "
        f"makes: about, and 1 once it is done. After {MAX_PROFILES} profiles new ones count as {OTHER!r}.",
        profile=(),
    ),
    _counter(
        "calibration", "flux_calibration_profile_runs", "runs",
        "Runs of a calibration by the profile that it makes and by phase: recorded ones, those that show how a "
        "displacement grows, and schedules that are tried.",
        profile=(), phase=CALIBRATION_PHASES,
    ),
    _counter(
        "calibration", "flux_calibration_profile_seconds", "seconds",
        "Time of these runs, waits for clients' images included.", profile=(),
    ),
    _counter(
        "calibration", "flux_calibrations", "calibrations", "Calibrations that have ended, by how.",
        result=("done", "cancelled", "failed"),
    ),
    # What each coordinator counts: decisions.
    _counter(
        "coordinator", "flux_steps", "steps", "Denoising steps by decision and CFG branch.",
        decision=DECISIONS, branch=BRANCHES,
    ),
    _counter(
        "coordinator", "flux_schedule_steps", "steps",
        "Steps of finished images (conditional branch) by tenth of their schedule, 0 is the first, and decision.",
        decile=DECILES, decision=DECISIONS,
    ),
    _histogram(
        "coordinator", "flux_request_skip_ratio", "share", RATIO,
        "Share of an image's steps that reused a residual, 0 to 1.", exemplars=True,
    ),
    _histogram(
        "coordinator", "flux_request_predicted_error", "error", ERROR,
        "Error that the profile predicts for an image's reused steps, as the image's reply reports it.",
        exemplars=True,
    ),
    # Time of the ranks.
    _histogram(
        "coordinator", "flux_step_duration_seconds", "seconds", STEP,
        "Time of one step plan on the slowest rank; kind is computed when any row computed, else reused.",
        kind=DECISIONS,
    ),
    _histogram(
        "coordinator", "flux_rank_step_duration_seconds", "seconds", STEP,
        "Time of one step plan on each rank. Ranks wait for each other in computed plans; in reused ones each is "
        "alone, and a slow one shows.",
        rank=(), kind=DECISIONS,
    ),
    _histogram(
        "coordinator", "flux_straggler_gap_seconds", "seconds", GAP,
        "Time of a step plan on the slowest rank less that on the fastest.", kind=DECISIONS,
    ),
    _counter(
        "coordinator", "flux_decision_seconds", "seconds",
        "Time of the slowest rank that went into computed and into reused steps, estimated where a plan mixed them.",
        decision=DECISIONS,
    ),
    _counter(
        "coordinator", "flux_saved_seconds", "seconds",
        "Estimate of the time that the reused steps would have taken longer had they been computed.",
    ),
    _histogram(
        "coordinator", "flux_plan_wait_seconds", "seconds", GAP,
        "Time that a rank with rows to step waited for a step plan, the longest of the ranks: the control plane's gap.",
    ),
    _counter(
        "coordinator", "flux_calibration_runs", "runs",
        "Images that a calibration or the quality guard ran to their last step; no other metric of this table counts "
        "them.",
    ),
    _counter(
        "coordinator", "flux_calibration_seconds", "seconds",
        "Time of the slowest rank on images of a calibration or the guard, which run while no client's image is there.",
    ),
    # The batch.
    _histogram(
        "coordinator", "flux_step_batch_rows", "rows", ROWS,
        "Rows that computed the block stack in one step plan, both CFG branches counted, if any did.",
    ),
    _histogram(
        "coordinator", "flux_step_batch_tokens", "tokens", TOKENS,
        "Tokens that went through the block stack in one step plan, if any did.",
    ),
    _gauge(
        "coordinator", "flux_residual_bytes", "bytes", "Memory of kept residuals and velocities, largest rank."
    ),
    # Images.
    _gauge("coordinator", "flux_running_pictures", "images", "Images being denoised now."),
    _gauge("coordinator", "flux_waiting_pictures", "images", "Images waiting for room in the batch."),
    _gauge("coordinator", "flux_waiting_pictures_limit", "images", "Waiting images at which new ones are refused."),
    _counter("coordinator", "flux_pictures_admitted", "images", "Images that joined the batch."),
    _counter("coordinator", "flux_pictures_finished", "images", "Images that took their last step."),
    _counter(
        "coordinator", "flux_pictures_refused", "images",
        "Images rejected at their arrival: the queue was full, or no allowed schedule meets the deadline.",
        reason=("queue_full", "deadline_impossible"),
    ),
    _counter(
        "coordinator", "flux_pictures_cancelled", "images",
        "Images that ended, waiting or running, because their client left or the request was cancelled.",
    ),
    _counter(
        "coordinator", "flux_deadline_misses", "images",
        "Admitted or queued images whose deadline passed before their last step.",
    ),
    _counter(
        "coordinator", "flux_downgrades", "images",
        "Admitted images with fewer computed steps than they asked for, taken by their deadline or by the load.",
        reason=("deadline", "load"),
    ),
    # Adapters.
    _gauge(
        "coordinator", "flux_lora_bytes", "bytes",
        "Memory set aside on each rank for the adapters that it keeps, `loras_bytes` at most.",
    ),
    _counter(
        "coordinator", "flux_lora_loads", "loads",
        "Adapters that the ranks were told to load, by result; of the failed ones the log has the reason.",
        result=("loaded", "failed"),
    ),
    # The group.
    _gauge(
        "coordinator", "flux_attention_info", "1",
        "Always 1; `backend` is the attention kernel of all ranks, which `attention_backend: auto` chose or names.",
        backend=(),
    ),
    _gauge("coordinator", "flux_group_up", "1", "1 while the tensor-parallel group works, 0 once it has failed."),
    _counter(
        "coordinator", "flux_group_rebuilds", "rebuilds",
        "Times that the tensor-parallel group was built again after a failure.",
    ),
    _counter("coordinator", "flux_digests_checked", "digests", "Ranks' history digests compared with the plan's."),
    _counter(
        "coordinator", "flux_digest_mismatches", "digests",
        "Plans whose history digest a rank did not agree with; each rebuilds the group.",
    ),
)  # fmt: skip

BY_NAME: Mapping[str, Spec] = MappingProxyType({spec.name: spec for spec in CATALOGUE})
