"""One image by this engine and by bare diffusers, from the same noise and the same prompt embedding, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import MagCacheConfig as DiffusersMagCacheConfig

from app.engine.engine import Engine
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import COND, DenoiseJob
from app.messages.plans import BranchStep, RowStep, StepPlan, chained
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import Part
from benchmarks.roofline import synchronize
from magcache_core import MagCacheConfig, Plan, decisions, load_profile
from magcache_core.plan_data import computed_steps

SEED = 7
GUIDANCE = 3.5


@dataclass(frozen=True)
class Request:
    """The image: ``size`` x ``size`` pixels; ``prompt`` as the text encoders would give it."""

    size: int
    steps: int
    prompt: PromptEmbeddings

    @property
    def config(self) -> MagCacheConfig:
        """The authors' curve and settings for FLUX.1-dev."""
        return load_profile("flux.1-dev").config(self.steps)

    def job(self, row_id: str, computing: tuple[int, ...] | None = None) -> DenoiseJob:
        """As the coordinator hands it to the ranks."""
        return DenoiseJob(row_id, self.size, self.size, self.steps, GUIDANCE, 1.0, SEED, computing=computing)


def random_model(part: Part, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """``part`` with random weights that are drawn on ``device``; tied ones stay tied."""
    model: Any = weights.build(part)
    described = dict(zip(map(id, model.parameters()), weights.tensors(model), strict=False))  # buffers come last
    drawn: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if key not in drawn:
                values = weights.draw(described[key], seed, device).to(dtype)
                drawn[key] = torch.nn.Parameter(values, requires_grad=False)
            setattr(module, leaf, drawn[key])
    return model.eval()


class Ours:
    """This repository's engine: one rank, plans formed ahead as the coordinator does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._device = engine.device

    def run(self, request: Request, plan: Plan, *, rows: int = 1, each_step: bool = False) -> dict[str, Any]:
        """Denoise ``rows`` images at once; ``each_step`` waits for the device after every step, to time it alone.

        Returns:
            ``seconds`` in all, ``step_seconds`` (with ``each_step``), and on rank 0 the first one's ``latents``, on the
            CPU.
        """
        computing = tuple(computed_steps(plan.schedule))
        jobs = tuple(request.job(f"benchmark/{row}", computing) for row in range(rows))
        kept = int("." in plan.schedule)
        branches = [
            BranchStep(COND, decision.compute, decision.weights, residuals_kept=kept) for decision in decisions(plan)
        ]
        steps = [[RowStep(job.row_id, step, (branch,)) for job in jobs] for step, branch in enumerate(branches)]
        steps[-1] = [replace(row, last=True) for row in steps[-1]]
        plans = chained(StepPlan(0, "", jobs if step == 0 else (), tuple(of)) for step, of in enumerate(steps))
        self.engine.restart()
        result, step_seconds = None, []
        synchronize(self._device)
        started = time.perf_counter()
        for one in plans:
            at = time.perf_counter()
            result = self.engine.execute(one, [Conditioning(request.prompt) for _ in one.admit])
            if each_step:
                synchronize(self._device)
                step_seconds.append(time.perf_counter() - at)
        synchronize(self._device)
        assert result is not None
        latents = result.latents.get(jobs[0].row_id)
        return {
            "seconds": time.perf_counter() - started,
            "step_seconds": step_seconds,
            "latents": None if latents is None else latents.float(),
        }

    def one_step(self, request: Request, *, computed: bool) -> Callable[[], torch.Tensor]:
        """One step of one row to its new latents, as often as it is called: what it starts from stays as it is."""
        engine, job = self.engine, request.job("benchmark/0")
        first = RowStep(job.row_id, 0, (BranchStep(COND, True, (), residuals_kept=1),))
        (plan,) = chained([StepPlan(0, "", (job,), (first,))])
        engine.restart()
        engine.execute(plan, [Conditioning(request.prompt)])
        row = engine.rows[job.row_id]
        latents, residuals = row.latents, list(row.branches[COND].residuals)
        step = RowStep(job.row_id, 1, (BranchStep(COND, computed, () if computed else (1.0,), residuals_kept=1),))

        @torch.inference_mode()
        def again() -> torch.Tensor:
            engine._step([step])
            moved, row.latents = row.latents, latents
            row.branches[COND].residuals.clear()
            row.branches[COND].residuals.extend(residuals)
            return moved

        return again


class Bare:
    """diffusers' `FluxPipeline`, without and with its own MagCache, at the same settings and curve."""

    def __init__(self, folder: Path, transformer: Any, device: torch.device) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        self._pipeline: Any = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
        self._pipeline.set_progress_bar_config(disable=True)
        self._device = device

    def run(self, request: Request, *, cached: bool) -> dict[str, Any]:
        """Denoise once; as `Ours.run`, when ``cached`` with ``schedule`` as it was seen to happen."""
        transformer = self._pipeline.transformer
        ran: list[bool] = []
        marks = []
        inner = None
        if cached:
            # The last block runs in every step that computes and in no other, whatever skips it.
            last = transformer.single_transformer_blocks[-1].attn
            inner = last.register_forward_pre_hook(lambda *_: ran.append(True))
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
            if inner is not None:
                inner.remove()
                transformer.disable_cache()
        return {
            "seconds": seconds,
            "schedule": "".join(marks) if cached else "C" * request.steps,
            "latents": latents[0].float().cpu(),
        }


def timed(seconds: list[float], marks: str, mark: str) -> float | None:
    """Median seconds of the steps with ``mark``; the first step, which admits the row, does not count."""
    chosen = [second for second, what in list(zip(seconds, marks, strict=True))[1:] if what == mark]
    return median(chosen) if chosen else None
