"""Tiny checkpoints of every family, diffusers' pipeline of each, and plans written by hand."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from app.components.source_encoder import SourceEncoder
from app.engine.engine import Engine
from app.engine.families import Edits, Family, family_of
from app.engine.geometry import Geometry
from app.engine.layouts import Flux2Layout, unpack
from app.engine.source_fit import nearest_trained_size
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import COND, DenoiseJob
from app.messages.plans import BranchStep, RowStep, StepPlan, chained
from benchmarks.make_checkpoint import make_checkpoint
from magcache_core import Decision

TEXT_TOKENS = 12
TEXT_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class TinyModel:
    """One tiny checkpoint beside diffusers' pipeline on it, which is the oracle."""

    def __init__(self, model: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        base = model == "flux.2-klein-base"
        make_checkpoint(
            "flux.2-klein-4b" if base else model, "tiny", folder, components=("transformer", "scheduler", "vae")
        )
        if base:  # the undistilled model has the same layout and geometry
            index = folder / "model_index.json"
            index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
        self.folder = folder
        self.dtype = dtype
        self.family: Family = family_of(folder)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline that ``model_index.json`` names, without text encoders."""
        index = diffusers.DiffusionPipeline.load_config(self.folder)
        absent = {name: None for name in TEXT_ENCODERS if name in index}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prompt(self, seed: int) -> PromptEmbeddings:
        """Random embeddings of the sizes that the transformer takes."""
        config = self.pipeline.transformer.config
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(TEXT_TOKENS, config.joint_attention_dim, generator=generator).to(self.dtype)
        if "pooled_projection_dim" not in config:
            return PromptEmbeddings(tokens)
        return PromptEmbeddings(tokens, torch.randn(config.pooled_projection_dim, generator=generator).to(self.dtype))

    def conditioning(
        self, job: DenoiseJob, images: Sequence[Image.Image] = (), mask: Image.Image | None = None
    ) -> Conditioning:
        """What the service would send along with ``job``: prompts with seeds 1 and 2, encoded source images."""
        encoder = SourceEncoder(self.pipeline.vae, self.family, max_pixels=job.width * job.height)
        masked = None if mask is None else np.asarray(mask)
        sources = tuple(encoder.encode(np.asarray(one), job.width, job.height, masked) for one in images)
        negative = self.prompt(2) if job.true_cfg_scale > 1 else None
        return Conditioning(self.prompt(1), negative, sources)

    def reference(
        self, job: DenoiseJob, images: Sequence[Image.Image] = (), mask: Image.Image | None = None
    ) -> torch.Tensor:
        """Tokens, (image_tokens, channels), that diffusers' pipeline makes for ``job``."""
        asked: dict[str, Any] = {
            "width": job.width,
            "height": job.height,
            "num_inference_steps": job.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(job.seed),
            "output_type": "latent",
            "prompt_embeds": self.prompt(1).tokens[None],
        }
        if job.true_cfg_scale > 1:
            asked["negative_prompt_embeds"] = self.prompt(2).tokens[None]
        if isinstance(self.family.layout, Flux2Layout):
            # What is called guidance there is true CFG.
            latents = self.pipeline(**asked, image=list(images) or None, guidance_scale=job.true_cfg_scale).images
            return self.family.layout.from_vae(self.pipeline.vae, latents)[0]
        asked |= {"guidance_scale": job.guidance_scale, "true_cfg_scale": job.true_cfg_scale}
        asked["pooled_prompt_embeds"] = self.prompt(1).pooled[None]
        if job.true_cfg_scale > 1:
            asked["negative_pooled_prompt_embeds"] = self.prompt(2).pooled[None]
        if job.strength is not None:
            # Given as latents: the pipeline would sample them from the VAE's posterior, the service takes its mode.
            (source,) = self.conditioning(job, images).sources
            geometry = Geometry.of(job.width, job.height)
            asked |= {"image": unpack(source.latents[None], geometry), "strength": job.strength}
            kind = diffusers.FluxImg2ImgPipeline if mask is None else diffusers.FluxInpaintPipeline
            if mask is not None:  # the VAE's latents of the masked image are for Fill checkpoints and not used
                asked |= {"mask_image": mask, "masked_image_latents": asked["image"]}
            edits = kind(**self.pipeline.components)
            edits.set_progress_bar_config(disable=True)
            return edits(**asked).images[0]
        if self.family.edits is Edits.REFERENCES:
            asked |= {"max_area": job.width * job.height, "_auto_resize": False}
            for one in images:  # the pipeline's own choice of size is a megapixel
                size = nearest_trained_size(self.family.trained_sizes, *one.size, job.width * job.height)
                asked["image"] = one.resize(size, Image.Resampling.LANCZOS)
        return self.pipeline(**asked).images[0]

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor, job: DenoiseJob) -> np.ndarray:
        """Pixels in [0, 1], (height, width, 3)."""
        vae = self.pipeline.vae
        latents = self.family.layout.to_vae(vae, tokens[None], Geometry.of(job.width, job.height))
        pixels = vae.decode(latents, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="np")[0]


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with structure at several scales."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def plans(
    job: DenoiseJob, decided: Mapping[str, Sequence[Decision]] | None = None, previews: Container[int] = ()
) -> list[StepPlan]:
    """The plans of one job alone; every step computes unless ``decided`` says otherwise, per branch."""
    formed = []
    for step in range(job.steps_to_run):
        branches = tuple(_branch_step(name, decided[name], step) if decided else BranchStep(name, True, (), 0)
                         for name in job.branches)  # fmt: skip
        last = step + 1 == job.steps_to_run
        ahead = decided[COND][step].velocity if decided else None
        moves = (ahead.move, ahead.estimate) if ahead else ((), ())
        row = RowStep(job.row_id, step, branches, last, step in previews, *moves)
        formed.append(StepPlan(0, "", (job,) if step == 0 else (), (row,)))
    return chained(formed)


def _branch_step(branch: str, decisions: Sequence[Decision], step: int) -> BranchStep:
    history = max(len(decision.weights) for decision in decisions)
    return BranchStep(branch, decisions[step].compute, decisions[step].weights, history)


def together(jobs: Sequence[DenoiseJob]) -> list[StepPlan]:
    """The plans of several jobs with equally many steps, all in one batch, every step computed."""
    return chained(
        StepPlan(0, "", tuple(jobs) if step == 0 else (), tuple(row for plan in alone for row in plan.rows))
        for step, alone in enumerate(zip(*map(plans, jobs), strict=True))
    )


def run(engine: Engine, formed: Sequence[StepPlan], conditioning: Conditioning) -> torch.Tensor:
    """The finished tokens of the job that ``formed`` admits, (image_tokens, channels); on rank 0 only."""
    result = None
    for plan in formed:
        result = engine.execute(plan, [conditioning for _ in plan.admit])
    assert result is not None
    return next(iter(result.latents.values()), torch.empty(0))
