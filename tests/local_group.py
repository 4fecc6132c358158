"""Run jobs as the service does, scheduler and engine together, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from app.control.admission import AdmissionController
from app.control.request import RequestState
from app.control.schedule import SchedulePlanner
from app.engine.engine import Engine
from app.engine.sampling import FlowMatchSampler
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.messages.results import StepTime
from app.settings import MagCacheSettings, Settings

MODEL = Path(__file__).resolve().parents[1] / "models/flux-tiny"
CACHE_OFF = MagCacheOptions(enabled=False)
TEXT_TOKENS = 32
MEASURED = (StepTime(1, True, 0.01), StepTime(1, False, 0.001))


def job(row_id: str, *, size: tuple[int, int] = (128, 128), steps: int = 28, seed: int = 7, **options) -> DenoiseJob:
    """A job with the shipped model's defaults, MagCache off."""
    width, height = size
    request_id = row_id.partition("/")[0]
    values = {"guidance_scale": 3.5, "true_cfg_scale": 1.0, "magcache": CACHE_OFF, **options}
    return DenoiseJob(row_id, width, height, steps, seed=seed, request_id=request_id, **values)


def random_conditioning(asked: DenoiseJob | None = None, seed: int = 0) -> Conditioning:
    """Random embeddings in flux-tiny's sizes, one for each CFG branch of ``asked``."""
    generator = torch.Generator().manual_seed(seed)
    branches = ("cond",) if asked is None else asked.branches
    return Conditioning(
        *(
            PromptEmbeddings(torch.randn(TEXT_TOKENS, 128, generator=generator), torch.randn(128, generator=generator))
            for _ in branches
        )
    )


@dataclass(frozen=True)
class Formed:
    """What became of some jobs: the plans, each image's table entry, and the table at the end."""

    plans: list[StepPlan]
    entries: dict[str, RequestState]
    admission: AdmissionController


def form(
    jobs: Sequence[DenoiseJob],
    settings: Settings,
    arrivals: Sequence[int] = (),
    cancellations: Mapping[str, int] | None = None,
) -> Formed:
    """Form all plans for ``jobs`` as the coordinator does.

    Args:
        arrivals: job i is there before tick ``arrivals[i]``; 0 where nothing is said.
        cancellations: row ids, and the tick before which each is cancelled.
    """
    now = [0.0]
    admission = AdmissionController(
        settings, SchedulePlanner(settings, FlowMatchSampler(MODEL)), MEASURED, lambda: now[0]
    )
    scheduler = admission.scheduler
    coming = sorted(zip_longest(arrivals, jobs, fillvalue=0), key=lambda pair: pair[0])
    leaving = dict(cancellations or {})
    entries: dict[str, RequestState] = {}
    formed: list[StepPlan] = []
    while coming or not scheduler.empty:
        while coming and coming[0][0] <= now[0]:
            arriving = coming.pop(0)[1]
            entries[arriving.row_id] = admission.submit(arriving)
        for row_id in [row_id for row_id, tick in leaving.items() if tick <= now[0] and row_id in entries]:
            scheduler.cancel(row_id)
            del leaving[row_id]
        plan = scheduler.next_plan()
        if plan is not None:
            formed.append(plan)
        now[0] += 1
    return Formed(formed, entries, admission)


def plans(
    jobs: Sequence[DenoiseJob], profile: str = "flux.1-dev", max_batch_rows: int = 8, arrivals: Sequence[int] = ()
) -> list[StepPlan]:
    """All plans for ``jobs``; see `form`."""
    settings = Settings(magcache=MagCacheSettings(profile=profile), max_batch_rows=max_batch_rows)
    return form(jobs, settings, arrivals).plans


def execute(
    engine: Engine, formed: Sequence[StepPlan], conditioning: dict[str, Conditioning]
) -> dict[str, torch.Tensor]:
    """Latents by row id."""
    latents: dict[str, torch.Tensor] = {}
    for plan in formed:
        latents |= engine.execute(plan, [conditioning[admitted.row_id] for admitted in plan.admit]).latents
    return latents


def load_pipeline() -> FluxPipeline:
    """Diffusers' own pipeline on the shipped model: the oracle."""
    pipeline = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(pipeline: FluxPipeline, prompt: str) -> PromptEmbeddings:
    """What the prompt encoder makes of ``prompt``."""
    with torch.inference_mode():
        tokens, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=TEXT_TOKENS)
    return PromptEmbeddings(tokens[0], pooled[0])


def reference(pipeline: FluxPipeline, prompt: str, asked: DenoiseJob, **options) -> torch.Tensor:
    """Packed latents, (image_tokens, channels), of diffusers' pipeline for the same request."""
    return pipeline(
        prompt,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        true_cfg_scale=asked.true_cfg_scale,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="latent",
        **options,
    ).images[0]


@torch.inference_mode()
def decode(pipeline: FluxPipeline, latents: torch.Tensor, asked: DenoiseJob) -> np.ndarray:
    """Pixels in [0, 1], (height, width, 3)."""
    unpacked = pipeline._unpack_latents(latents[None], asked.height, asked.width, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    pixels = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels, output_type="np")[0]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; equal images give 200."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return 10 * np.log10(1 / max(error, 1e-20))
