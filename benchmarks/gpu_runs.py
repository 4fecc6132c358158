"""One picture by this engine and by bare diffusers, from the same noise and the same prompt embedding, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import MagCacheConfig as DiffusersMagCacheConfig

from app.engine.engine import Engine
from app.messages import (
    COND,
    BranchStep,
    Conditioning,
    DenoiseJob,
    PromptEmbeddings,
    RowStep,
    StepPlan,
    chained,
)
from benchmarks.checkpoints import weights
from benchmarks.roofline import synchronize
from magcache_core import MagCacheConfig, decisions, load_profile, schedule

SEED = 7
GUIDANCE = 3.5


@dataclass(frozen=True)
class Request:
    """The picture: ``size`` x ``size`` pixels; ``prompt`` as the text encoders would give it."""

    size: int
    steps: int
    prompt: PromptEmbeddings

    @property
    def config(self) -> MagCacheConfig:
        """The authors' curve and settings for FLUX.1-dev."""
        return load_profile("flux.1-dev").config(self.steps)


def random_transformer(model: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Give ``model``, built on the meta device, random weights that are drawn on ``device``."""
    for tensor in weights.tensors(model):
        owner, _, leaf = tensor.name.rpartition(".")
        values = weights.draw(tensor, seed, device).to(dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()


class Ours:
    """This repository's engine: one rank, one row, plans formed ahead as the coordinator does."""

    def __init__(self, folder: Path, transformer: Any, device: torch.device, dtype: torch.dtype) -> None:
        """``folder`` holds a checkpoint's configuration; the weights are those of ``transformer``."""
        self._engine = Engine(folder, device=device, dtype=dtype, transformer=transformer)
        self._device = device

    def run(self, request: Request, *, cached: bool, each_step: bool = False) -> dict[str, Any]:
        """Denoise once; ``each_step`` waits for the device after every step, to time it alone.

        Returns:
            ``seconds`` in all, ``step_seconds`` (with ``each_step``), ``schedule``, and ``latents`` on the CPU.
        """
        marks = schedule(request.config) if cached else "C" * request.steps
        weights_of = [one.weights for one in decisions(request.config)] if cached else [()] * request.steps
        job = DenoiseJob("benchmark/0", request.size, request.size, request.steps, GUIDANCE, 1.0, SEED)
        branches = [
            BranchStep(COND, mark == "C", used, residuals_kept=int(cached))
            for mark, used in zip(marks, weights_of, strict=True)
        ]
        rows = [RowStep(job.row_id, step, (branch,)) for step, branch in enumerate(branches)]
        rows[-1] = replace(rows[-1], last=True)
        plans = chained(StepPlan(0, "", (job,) if row.step == 0 else (), (row,)) for row in rows)
        self._engine.restart()
        result, step_seconds = None, []
        synchronize(self._device)
        started = time.perf_counter()
        for plan in plans:
            at = time.perf_counter()
            result = self._engine.execute(plan, [Conditioning(request.prompt) for _ in plan.admit])
            if each_step:
                synchronize(self._device)
                step_seconds.append(time.perf_counter() - at)
        synchronize(self._device)
        assert result is not None
        return {
            "seconds": time.perf_counter() - started,
            "step_seconds": step_seconds,
            "schedule": marks,
            "latents": result.latents[job.row_id].float(),
        }


class Bare:
    """diffusers' `FluxPipeline`, without and with its own MagCache, at the same settings and curve."""

    def __init__(self, folder: Path, transformer: Any, device: torch.device) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        self._pipeline: Any = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
        self._pipeline.set_progress_bar_config(disable=True)
        self._device = device

    def run(self, request: Request, *, cached: bool) -> dict[str, Any]:
        """Denoise once; as `Ours.run`, with ``schedule`` as it was seen to happen."""
        transformer = self._pipeline.transformer
        ran: list[bool] = []
        # The last block runs in every step that computes and in no other, whatever skips it.
        inner = transformer.single_transformer_blocks[-1].attn.register_forward_pre_hook(lambda *_: ran.append(True))
        marks = []
        if cached:
            config = request.config
            transformer.enable_cache(
                DiffusersMagCacheConfig(
                    threshold=config.threshold,
                    max_skip_steps=config.max_skip_steps,
                    retention_ratio=config.retention_ratio,
                    num_inference_steps=request.steps,
                    mag_ratios=torch.tensor(config.mag_ratios),
                )
            )

        def mark(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append("C" if ran else ".")
            ran.clear()
            return tensors

        try:
            synchronize(self._device)
            started = time.perf_counter()
            latents = self._pipeline(
                prompt_embeds=request.prompt.tokens[None].to(self._device),
                pooled_prompt_embeds=request.prompt.pooled[None].to(self._device),  # type: ignore[index]
                height=request.size,
                width=request.size,
                num_inference_steps=request.steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(SEED),
                output_type="latent",
                callback_on_step_end=mark,
            ).images
            synchronize(self._device)
            seconds = time.perf_counter() - started
        finally:
            inner.remove()
            if cached:
                transformer.disable_cache()
        return {"seconds": seconds, "schedule": "".join(marks), "latents": latents[0].float().cpu()}


def timed(seconds: list[float], marks: str, mark: str) -> float | None:
    """Median seconds of the steps with ``mark``; the first step, which admits the row, does not count."""
    chosen = [second for second, what in list(zip(seconds, marks, strict=True))[1:] if what == mark]
    return median(chosen) if chosen else None
