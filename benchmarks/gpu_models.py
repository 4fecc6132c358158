"""The models that `benchmarks.gpu_worker` measures, each made when the first variant needs it."""

from __future__ import annotations

import gc
import tempfile
from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from app.engine.attention_backends import AttentionBackend, AttentionShape
from app.engine.engine import Engine
from app.engine.fp8 import quantize
from app.engine.fused import fuse
from app.engine.geometry import Geometry
from app.engine.parallel import planned_linears
from app.engine.tuning import Tuning, UsualRow, tune
from app.messages.conditioning import PromptEmbeddings
from benchmarks import gpu_peaks
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import repository
from benchmarks.gpu_runs import Ours, Request, random_model
from benchmarks.make_checkpoint import make_checkpoint
from magcache_core import Plan, choose, load_profile

MODEL = "flux.1-dev"
KERNELS: tuple[AttentionBackend, ...] = ("flash", "cudnn", "fa3")
GRAPHS = 64
"""Per kind of block; several engines and diffusers' own pipeline compile the same functions in this process."""


class Models:
    """Of a checkpoint with random weights: this repository's engine and diffusers' transformer, on one device.

    Args:
        settings: the command line of `benchmarks.gpu`.
        results: of the variants so far, which tell the fastest kernel.
    """

    def __init__(self, settings: Namespace, results: dict[str, Any]) -> None:
        self.settings = settings
        self.results = results
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.parts = repository(MODEL, settings.scale).parts
        self._ours: tuple[str, Any] = ("", None)
        self._kernel: AttentionBackend = "auto"

    @cached_property
    def folder(self) -> Path:
        """A checkpoint's configuration without weights."""
        folder = Path(tempfile.mkdtemp(prefix="flux-gpu-"))
        make_checkpoint(MODEL, self.settings.scale, folder, components=["scheduler"])
        model: Any = weights.build(self.parts["transformer"])
        model.save_config(folder / "transformer")
        return folder

    @cached_property
    def drawn(self) -> Any:
        """The transformer's random weights."""
        return random_model(self.parts["transformer"], self.device, self.dtype)

    def request(self, size: int) -> Request:
        """One image of ``size`` x ``size``."""
        config: Any = weights.build(self.parts["transformer"]).config  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(self.settings.text_tokens, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(config.pooled_projection_dim, generator=generator)
        prompt = PromptEmbeddings(tokens.to(self.dtype), pooled.to(self.dtype))
        return Request(size, self.settings.steps, prompt)

    def plan(self, computed: int | None = None) -> Plan:
        """The authors' schedule, or the best one with ``computed`` steps at this number of steps."""
        profile = load_profile(MODEL)
        if computed is None:
            return choose(profile, self.settings.steps)
        return choose(profile, self.settings.steps, budget=max(2, round(computed * self.settings.steps / 28)))

    def twin(self) -> Any:
        """The same weights in modules of their own: kernels and compilation are set on modules."""
        twin: Any = weights.build(self.parts["transformer"])
        twin.load_state_dict(self.drawn.state_dict(), assign=True)
        return twin.requires_grad_(False).eval()

    def attention(self, size: int) -> AttentionShape:
        """The joint attention of an image of ``size`` x ``size``."""
        config: Any = weights.build(self.parts["transformer"]).config  # type: ignore[attr-defined]
        tokens = Geometry.of(size, size).tokens + self.settings.text_tokens
        return AttentionShape(tokens, config.num_attention_heads, config.attention_head_dim)

    def kernel(self) -> AttentionBackend:
        """The attention kernel with which a compiled step took least, so far; until one has, flash."""
        took = {kernel: self.results.get(f"bf16/1 row, {kernel}", {}).get("computed_step_s") for kernel in KERNELS}
        known = {kernel: seconds for kernel, seconds in took.items() if seconds}
        return min(known, key=known.__getitem__) if known else "flash"

    def use_kernel(self, kernel: AttentionBackend | None = None) -> AttentionBackend:
        """Make attention run by ``kernel``, or by the fastest; what was compiled for another one is dropped."""
        kernel = kernel or self.kernel()
        gpu_peaks.check_kernel(kernel, self.attention(self.settings.size), self.device, self.dtype)
        if kernel != self._kernel:
            torch._dynamo.reset()
            self._ours = ("", None)
            self._kernel = kernel
        return kernel

    def ours(self, kind: str) -> Ours:
        """This repository's engine, the last one of them is kept.

        Args:
            kind: ``compiled`` as the service does it, ``fixed`` (for the size that comes), ``fp8`` (compiled) or
                ``eager``.
        """
        if self._ours[0] != kind:
            if "fixed" in (kind, self._ours[0]):
                torch._dynamo.reset()  # the code for any size would be taken for a fixed one
            self.drop_ours()
            transformer = self.twin()
            fuse(transformer)
            if kind == "fp8":
                for _, linear in planned_linears(transformer):
                    quantize(linear)
            # Sizes are fixed in one kind only: elsewhere no row is the usual one.
            usual = UsualRow(self.settings.size**2 // 256 if kind == "fixed" else 0, self.settings.text_tokens)
            tuning = Tuning(self._kernel, kind != "eager", usual=usual, compiler=self.settings.compiler)
            tune(transformer, tuning)
            torch._dynamo.config.recompile_limit = GRAPHS
            engine = Engine(self.folder, device=self.device, dtype=self.dtype, tuning=tuning, transformer=transformer)
            self._ours = (kind, Ours(engine))
        ours: Ours = self._ours[1]
        return ours

    def drop_ours(self) -> None:
        """Make room for another model."""
        self._ours = ("", None)
        clean(self.device)


def clean(device: torch.device) -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
