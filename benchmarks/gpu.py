"""What a step costs on one card, and what MagCache and compiling save there, against bare diffusers in the same run.

    python -m benchmarks.gpu                          # FLUX.1-dev's geometry, 1024x1024, 28 steps, bfloat16, cuda
    python -m benchmarks.gpu --scale tiny --device cpu --size 64      # the same path, small

The weights are random and drawn on the device: a step's time does not depend on them, and neither do MagCache's
decisions. No Ray, no text encoders and no VAE. Variants that there is no time left for by ``--budget-s`` are named as
left out. Figures of one run are comparable with each other; those of two machines are not.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from app.engine.geometry import Geometry
from app.engine.tuning import AttentionBackend, Tuning, TuningError, tune
from app.messages import PromptEmbeddings
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import SCALES, repository
from benchmarks.gpu_runs import Bare, Ours, Request, random_transformer, timed
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.roofline import matmul_flops_per_second, step_flops
from magcache_core import schedule

MODEL = "flux.1-dev"
RESULTS = Path(__file__).parent / "results" / "gpu.json"
TEXT_TOKENS = 512


class Benchmark:
    """All variants on one device; `report` grows as they finish, so that a run cut short has what it measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._started = time.monotonic()
        self._args = args
        self._device = torch.device(args.device)
        self._dtype = getattr(torch, args.dtype)
        self._part = repository(MODEL, args.scale).parts["transformer"]
        self._folder = Path(tempfile.mkdtemp(prefix="flux-gpu-"))
        make_checkpoint(MODEL, args.scale, self._folder, components=["scheduler"])
        model: Any = weights.build(self._part)
        model.save_config(self._folder / "transformer")
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(args.text_tokens, model.config.joint_attention_dim, generator=generator)
        pooled = torch.randn(model.config.pooled_projection_dim, generator=generator)
        self._request = Request(args.size, args.steps, PromptEmbeddings(tokens.to(self._dtype), pooled.to(self._dtype)))
        self.report: dict[str, Any] = {
            "machine": self._machine(),
            "date": time.strftime("%Y-%m-%d"),
            "model": f"{MODEL} at scale {args.scale}, random weights",
            "picture": {"size": args.size, "steps": args.steps, "text_tokens": args.text_tokens},
            "dtype": args.dtype,
            "schedule": schedule(self._request.config),
            "variants": [],
            "left_out": {},
        }

    def run(self) -> None:
        """Roofline, then every attention backend, eager and compiled."""
        self._roofline()
        drawn = random_transformer(weights.build(self._part), self._device, self._dtype)
        for backend in self._args.attention:
            try:
                for compiled in (False,) if self._args.no_compile else (False, True):
                    self._variant(backend, drawn, compiled=compiled)
            except TuningError as error:
                self.report["left_out"][backend] = str(error)
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _machine(self) -> str:
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else platform.machine()
        return f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}"

    def _twin(self, drawn: Any) -> Any:
        """The same weights in modules of their own: kernels and compilation are set on modules."""
        twin: Any = weights.build(self._part)
        twin.load_state_dict(drawn.state_dict(), assign=True)
        return twin.requires_grad_(False).eval()

    def _roofline(self) -> None:
        size = self._args.size
        flops = step_flops(self._part, Geometry.of(size, size), self._args.text_tokens)
        side = 8192 if self._device.type == "cuda" else 512
        peak = matmul_flops_per_second(self._device, self._dtype, side)
        self.report["roofline"] = {
            "step_tflop": flops / 1e12,
            "matmul_side": side,
            "matmul_tflops_per_s": peak / 1e12,
            "least_step_s": flops / peak,
        }

    def _variant(self, backend: AttentionBackend, drawn: Any, *, compiled: bool) -> None:
        name = f"{backend}, {'compiled' if compiled else 'eager'}"
        left = self._args.budget_s - (time.monotonic() - self._started)
        if left < 0:
            self.report["left_out"][name] = f"no time left of {self._args.budget_s:g} s"
            return
        tuning = Tuning(attention_backend=backend, compile=compiled, compiler=self._args.compiler)
        tuned, transformer = self._twin(drawn), self._twin(drawn)
        tune(tuned, tuning, self._device, self._dtype)
        ours = Ours(self._folder, tuned, self._device, self._dtype)
        if backend != "native":
            transformer.set_attention_backend(backend)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=self._args.compiler)
        bare = Bare(self._folder, transformer, self._device)
        warm = time.perf_counter()
        ours.run(self._request, cached=True)  # compiles, and settles the allocator
        warm_s = time.perf_counter() - warm
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole = self._best(lambda: ours.run(self._request, cached=False))
        cached = self._best(lambda: ours.run(self._request, cached=True))
        steps = ours.run(self._request, cached=True, each_step=True)
        memory = torch.cuda.max_memory_allocated() / 1e9 if self._device.type == "cuda" else None
        bare.run(self._request, cached=False)
        bare_whole = self._best(lambda: bare.run(self._request, cached=False))
        if compiled:
            # Its hooks are excluded from compilation, and one graph per block is impossible with them.
            transformer.compile_repeated_blocks(dynamic=True, backend=self._args.compiler)
        bare.run(self._request, cached=True)
        bare_cached = self._best(lambda: bare.run(self._request, cached=True))
        computed_s = timed(steps["step_seconds"], steps["schedule"], "C")
        count = cached["schedule"].count("C")
        entry = {
            "name": name,
            "first_picture_s": warm_s,
            "computed_step_s": computed_s,
            "reused_step_s": timed(steps["step_seconds"], steps["schedule"], "."),
            "picture_s": whole["seconds"],
            "picture_magcache_s": cached["seconds"],
            "speed_up": whole["seconds"] / cached["seconds"],
            "total_over_computed": len(cached["schedule"]) / count,
            "fraction_of_roofline": self.report["roofline"]["least_step_s"] / computed_s if computed_s else None,
            "peak_memory_gb": memory,
            "diffusers_s": bare_whole["seconds"],
            "diffusers_magcache_s": bare_cached["seconds"],
            "diffusers_magcache_schedule": bare_cached["schedule"],
            "speed_up_over_diffusers": bare_whole["seconds"] / cached["seconds"],
            "difference_to_diffusers": _difference(whole["latents"], bare_whole["latents"]),
        }
        self.report["variants"].append(entry)
        print(json.dumps(entry), flush=True)

    def _best(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return min((run() for _ in range(self._args.repeats)), key=lambda result: result["seconds"])


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference of two pictures' latents over the norm of the second."""
    return float((ours - theirs).norm() / theirs.norm())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", type=int, default=1024, help="side of the square picture in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS)
    parser.add_argument("--attention", nargs="+", default=["native", "xformers"], metavar="BACKEND")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--no-compile", action="store_true", help="eager variants only")
    parser.add_argument("--repeats", type=int, default=2, help="pictures per figure; the fastest counts")
    parser.add_argument("--budget-s", type=float, default=420.0, help="start no variant after so many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and write the report, also of a run that fails on its way."""
    args = parse(argv)
    benchmark = Benchmark(args)
    try:
        benchmark.run()
    finally:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(benchmark.report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
