"""What `benchmarks.gpu` runs in a process of its own: measure variants, and say what became of each at once.

Started with one argument, JSON: ``settings`` (the command line of `benchmarks.gpu`), ``variants`` in their order, and
``results`` known already. It ends after the first variant that fails, since an error on a GPU often leaves the process
unusable.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

# Compiled code is also kept by the program it was made of, before attention is one kernel or the other: the second
# kernel's run would be given the first one's code.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import diffusers
import torch
import transformers

from app.engine.attention_backends import AttentionBackend, AttentionShape, prefer, set_attention
from app.engine.engine import Engine
from app.engine.fp8 import quantize
from app.engine.fused import fuse
from app.engine.geometry import Geometry
from app.engine.parallel import planned_linears
from app.engine.tuning import Tuning, UsualRow, tune
from app.messages.conditioning import PromptEmbeddings
from benchmarks import gpu_parts, gpu_peaks, gpu_ranks
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import repository
from benchmarks.gpu_peaks import Unavailable
from benchmarks.gpu_runs import Bare, Ours, Request, random_model, timed
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.roofline import step_flops
from magcache_core import Plan, choose, load_profile

MODEL = "flux.1-dev"
ERROR_LENGTH = 300
"""Of what an error says; the whole is in the log."""
KERNELS: tuple[AttentionBackend, ...] = ("flash", "cudnn", "fa3")
GRAPHS = 64
"""Per kind of block; several engines and diffusers' own pipeline compile the same functions in this process."""


class Bench:
    """The models on the device, each made when the first variant needs it, and the variants that run them."""

    def __init__(self, settings: Namespace, results: dict[str, Any]) -> None:
        self.settings = settings
        self.results = results
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.parts = repository(MODEL, settings.scale).parts
        self._ours: tuple[str, Any] = ("", None)
        self._kernel: AttentionBackend = "auto"
        self._uncached: torch.Tensor | None = None

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
            self._ours = ("", None)
            clean(self.device)
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

    def step(
        self, kind: str, *, rows: int = 1, size: int = 0, kernel: AttentionBackend | None = None, whole: bool = False
    ) -> dict[str, Any]:
        """Times of a computed and of a reused step of ``rows`` equal rows; with ``whole``, of uncached images, too."""
        kernel = self.use_kernel(kernel)
        one_row = "small/1 row" if size else {"fp8": "fp8/1 row"}.get(kind, f"bf16/1 row, {kernel}")
        ours, request, plan = self.ours(kind), self.request(size or self.settings.size), self.plan()
        started = time.perf_counter()
        ours.run(request, plan, rows=rows)  # compiles, and settles the allocator
        first_s = time.perf_counter() - started
        self._reset_peak()
        cached = self._best(lambda: ours.run(request, plan, rows=rows))
        steps = ours.run(request, plan, rows=rows, each_step=True)
        computed_s = timed(steps["step_seconds"], plan.schedule, "C")
        least_s = self._least_step_s(request.size, rows)
        result: dict[str, Any] = {
            "attention": kernel,
            "computed_step_s": computed_s,
            "reused_step_s": timed(steps["step_seconds"], plan.schedule, "."),
            "fraction_of_roofline": least_s / computed_s if least_s and computed_s else None,
            "image_magcache_s": cached["seconds"],
            "first_image_s": first_s,
            "finite": bool(torch.isfinite(cached["latents"]).all()),
        }
        if rows > 1 and computed_s and (alone := self.results.get(one_row)):
            result["times_one_row"] = computed_s / alone["computed_step_s"]
        if whole:
            uncached = self._best(lambda: ours.run(request, Plan("C" * request.steps)))
            result |= {"image_s": uncached["seconds"], "speed_up": uncached["seconds"] / cached["seconds"]}
            if kind != "fp8":  # diffusers' pipeline has no 8-bit weights to compare with
                self._uncached = uncached["latents"]
        return result | self._peak()

    def diffusers(self, *, compiled: bool, cached: bool) -> dict[str, Any]:
        """An image by diffusers' own pipeline, with its own MagCache or without any."""
        kernel = self.use_kernel()
        self._ours = ("", None)
        clean(self.device)
        transformer, request = self.twin(), self.request(self.settings.size)
        set_attention(transformer, kernel)
        if compiled:
            torch._dynamo.config.recompile_limit = GRAPHS
            # Its hooks are excluded from compilation, and one graph per block is impossible with them.
            transformer.compile_repeated_blocks(fullgraph=not cached, backend=self.settings.compiler)
        bare = Bare(self.folder, transformer, self.device)
        started = time.perf_counter()
        with prefer(kernel):
            bare.run(request, cached=cached)
            first_s = time.perf_counter() - started
            self._reset_peak()
            best = self._best(lambda: bare.run(request, cached=cached))
        result = {
            "attention": kernel,
            "image_s": best["seconds"],
            "schedule": best["schedule"],
            "first_image_s": first_s,
        }
        if not cached and self._uncached is not None:
            result["difference_to_ours"] = difference(self._uncached, best["latents"])
        return result | self._peak()

    def schedule(self, computed: int | None) -> dict[str, Any]:
        """An image by one schedule."""
        kernel = self.use_kernel()
        ours, request, plan = self.ours("compiled"), self.request(self.settings.size), self.plan(computed)
        ours.run(request, plan)
        best = self._best(lambda: ours.run(request, plan))
        return {
            "attention": kernel,
            "schedule": plan.schedule,
            "reuse": plan.reuse,
            "computed": plan.computed,
            "image_s": best["seconds"],
        }

    def graph(self, *, computed: bool, size: int = 0) -> dict[str, Any]:
        """A step launched operator by operator, and with its pass replayed as one CUDA graph."""
        kernel = self.use_kernel()
        ours = self.ours("compiled")
        work = ours.one_step(self.request(size or self.settings.size), computed=computed)
        return {"attention": kernel} | gpu_peaks.replayed(ours.engine, work, self.device)

    def kernels(self, kind: str) -> dict[str, Any]:
        """Where the time of a computed step goes, kernel by kernel; ``kind`` as for `ours`."""
        kernel = self.use_kernel()
        work = self.ours(kind).one_step(self.request(self.settings.size), computed=True)
        return {"attention": kernel, "kernels": gpu_peaks.kernels(work, self.device)}

    def _least_step_s(self, size: int, rows: int) -> float | None:
        """The least time that a step can take at the rate of this device's large matrix products."""
        rate = self.results.get("peaks/matmul", {}).get("tflops_per_s")
        if rate is None:
            return None
        flops = step_flops(self.parts["transformer"], Geometry.of(size, size), self.settings.text_tokens)
        return rows * flops / (rate * 1e12)

    def _best(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return min((run() for _ in range(self.settings.repeats)), key=lambda result: result["seconds"])

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> dict[str, Any]:
        return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if self.device.type == "cuda" else {}


def measures(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """How each of `gpu_variants.ORDER` is measured."""
    device, dtype, settings = bench.device, bench.dtype, bench.settings
    shape = bench.attention(settings.size)
    vae, t5 = bench.parts["vae"], bench.parts["text_encoder_2"]
    side = settings.size // 8
    decode = {"side": side, "device": device, "dtype": dtype, "compiler": settings.compiler}
    return {
        "peaks/matmul": lambda: gpu_peaks.matmul(device, dtype),
        "peaks/copy": lambda: gpu_peaks.copy(device),
        "peaks/attention flash": lambda: gpu_peaks.attention("flash", shape, device, dtype),
        "peaks/attention cudnn": lambda: gpu_peaks.attention("cudnn", shape, device, dtype),
        "peaks/attention fa3": lambda: gpu_peaks.attention("fa3", shape, device, dtype),
        "peaks/attention xformers": lambda: gpu_peaks.attention("xformers", shape, device, dtype),
        "peaks/matmul fp8": lambda: gpu_peaks.matmul_fp8(device),
        "bf16/1 row, flash": lambda: bench.step("compiled", kernel="flash", whole=True),
        "bf16/1 row, cudnn": lambda: bench.step("compiled", kernel="cudnn", whole=True),
        "bf16/1 row, fa3": lambda: bench.step("compiled", kernel="fa3", whole=True),
        "bf16/4 rows": lambda: bench.step("compiled", rows=4),
        "bf16/1 row, fixed size": lambda: bench.step("fixed"),
        "bf16/1 row, eager": lambda: bench.step("eager", whole=True),
        "bf16/kernels of a computed step": lambda: bench.kernels("compiled"),
        "diffusers/compiled": lambda: bench.diffusers(compiled=True, cached=False),
        "diffusers/compiled, its MagCache": lambda: bench.diffusers(compiled=True, cached=True),
        "diffusers/eager": lambda: bench.diffusers(compiled=False, cached=False),
        "fp8/1 row": lambda: bench.step("fp8", whole=True),
        "fp8/kernels of a computed step": lambda: bench.kernels("fp8"),
        "fp8/4 rows": lambda: bench.step("fp8", rows=4),
        "schedules/authors": lambda: bench.schedule(None),
        "schedules/14 computed": lambda: bench.schedule(14),
        "schedules/9 computed": lambda: bench.schedule(9),
        "schedules/7 computed": lambda: bench.schedule(7),
        "small/1 row": lambda: bench.step("compiled", size=settings.small),
        "small/4 rows": lambda: bench.step("compiled", size=settings.small, rows=4),
        "small/8 rows": lambda: bench.step("compiled", size=settings.small, rows=8),
        "graphs/computed step": lambda: bench.graph(computed=True),
        "graphs/computed step, small": lambda: bench.graph(computed=True, size=settings.small),
        "graphs/reused step": lambda: bench.graph(computed=False),
        "vae/decode": lambda: gpu_parts.decode(vae, **decode),
        "vae/decode, compiled": lambda: gpu_parts.decode(vae, **decode, compiled_for=side),
        "vae/decode, compiled for any size": lambda: gpu_parts.decode(vae, **decode, compiled_for=side // 2),
        "vae/decode, tiled": lambda: gpu_parts.decode(vae, **decode, tiled=True),
        "t5/1 prompt": lambda: gpu_parts.encode(t5, 1, settings.text_tokens, device, dtype),
        "t5/4 prompts": lambda: gpu_parts.encode(t5, 4, settings.text_tokens, device, dtype),
        "ranks/tp 2 equals tp 1": lambda: gpu_ranks.equal(device),
    }


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference of two images' latents over the norm of the second."""
    return float((ours - theirs).norm() / theirs.norm())


def clean(device: torch.device) -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> str:
    """The device and the releases that matter."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    return (
        f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    )


def say(**message: Any) -> None:
    """Send a message to `benchmarks.gpu_process`."""
    print(json.dumps(message), flush=True)


def main(asked: dict[str, Any]) -> int:
    """Measure what was asked for; returns the process's exit code."""
    settings = Namespace(**asked["settings"])
    bench = Bench(settings, asked["results"])
    say(machine=machine(bench.device))
    todo = measures(bench)
    for name in asked["variants"]:
        try:
            result = todo[name]()
        except Unavailable as reason:
            say(variant=name, error=str(reason))
        except Exception as error:  # whatever it is, the others go on
            traceback.print_exc()
            said = " ".join(str(error).split())[:ERROR_LENGTH]
            say(variant=name, error=f"{type(error).__name__}: {said}")
            return 1
        else:
            bench.results[name] = result
            say(variant=name, result=result)
        clean(bench.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
