"""What `benchmarks.gpu` runs in a process of its own: measure variants, and say what became of each at once.

Started with one argument, JSON: ``settings`` (the command line of `benchmarks.gpu`), ``variants`` in their order, and
``results`` known already. It ends after the first variant that fails, since an error on a GPU often leaves the process
unusable.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import Any

# Compiled code is also kept by the program it was made of, before attention is one kernel or the other: the second
# kernel's run would be given the first one's code.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import diffusers
import torch
import transformers

from app.engine.attention_backends import AttentionBackend, prefer, set_attention
from app.engine.geometry import Geometry
from benchmarks import gpu_parts, gpu_peaks, gpu_ranks
from benchmarks.gpu_models import GRAPHS, Models, clean
from benchmarks.gpu_peaks import Unavailable
from benchmarks.gpu_runs import Bare, timed
from benchmarks.roofline import step_flops
from magcache_core import Plan

ERROR_LENGTH = 300
"""Of what an error says; the whole is in the log."""


class Bench:
    """The variants that run models, timed."""

    def __init__(self, settings: Namespace, results: dict[str, Any]) -> None:
        self.settings = settings
        self.results = results
        self.models = Models(settings, results)
        self.device = self.models.device
        self._uncached: torch.Tensor | None = None

    def step(
        self, kind: str, *, rows: int = 1, size: int = 0, kernel: AttentionBackend | None = None, whole: bool = False
    ) -> dict[str, Any]:
        """Times of a computed and of a reused step of ``rows`` equal rows; with ``whole``, of uncached images, too."""
        kernel = self.models.use_kernel(kernel)
        one_row = "small/1 row" if size else {"fp8": "fp8/1 row"}.get(kind, f"bf16/1 row, {kernel}")
        ours, plan = self.models.ours(kind), self.models.plan()
        request = self.models.request(size or self.settings.size)
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
        kernel = self.models.use_kernel()
        self.models.drop_ours()
        transformer, request = self.models.twin(), self.models.request(self.settings.size)
        set_attention(transformer, kernel)
        if compiled:
            torch._dynamo.config.recompile_limit = GRAPHS
            # Its hooks are excluded from compilation, and one graph per block is impossible with them.
            transformer.compile_repeated_blocks(fullgraph=not cached, backend=self.settings.compiler)
        bare = Bare(self.models.folder, transformer, self.device)
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
        kernel = self.models.use_kernel()
        ours, plan = self.models.ours("compiled"), self.models.plan(computed)
        request = self.models.request(self.settings.size)
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
        kernel = self.models.use_kernel()
        ours = self.models.ours("compiled")
        work = ours.one_step(self.models.request(size or self.settings.size), computed=computed)
        return {"attention": kernel} | gpu_peaks.replayed(ours.engine, work, self.device)

    def kernels(self, kind: str) -> dict[str, Any]:
        """Where the time of a computed step goes, kernel by kernel; ``kind`` as for `ours`."""
        kernel = self.models.use_kernel()
        work = self.models.ours(kind).one_step(self.models.request(self.settings.size), computed=True)
        return {"attention": kernel, "kernels": gpu_peaks.kernels(work, self.device)}

    def _least_step_s(self, size: int, rows: int) -> float | None:
        """The least time that a step can take at the rate of this device's large matrix products."""
        rate = self.results.get("peaks/matmul", {}).get("tflops_per_s")
        if rate is None:
            return None
        flops = step_flops(self.models.parts["transformer"], Geometry.of(size, size), self.settings.text_tokens)
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
    models, settings = bench.models, bench.settings
    device, dtype, shape = models.device, models.dtype, models.attention(settings.size)
    vae, t5 = models.parts["vae"], models.parts["text_encoder_2"]
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
