"""Peak host memory and time of loading a transformer's shards, each rank in a process of its own, all at once.

    python -m benchmarks.loading

The checkpoint is FLUX.1-dev's transformer at 1/8 scale (1.5 B parameters, bfloat16; random weights). A rank's memory is
what the kernel calls VmHWM, the peak of its resident set from the start of the process, interpreter and libraries
included; the bound is 1.15 times its shard plus 300 MB. Cold means that the files were dropped from the page cache.
`from_pretrained` of diffusers loads the whole model in the same run, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from benchmarks.checkpoints.geometry import SCALES
from benchmarks.make_checkpoint import make_checkpoint

MODEL = "flux.1-dev"
RESULTS = Path(__file__).parent / "results" / "loading.json"
BOUND = "1.15 x shard + 300 MB"


def bound_mb(shard_mb: float) -> float:
    """Most host memory that a rank may need, in MB of 10^6 bytes."""
    return 1.15 * shard_mb + 300.0


def peak_mb() -> float:
    """Peak resident set of this process so far, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def load_once(model: Path, rank: int, size: int, *, by_diffusers: bool = False) -> dict[str, Any]:
    """Load in this process: seconds, MB of weights, peak MB before (libraries alone) and after."""
    torch.set_num_threads(1)
    before = peak_mb()
    started = time.perf_counter()
    if by_diffusers:
        from diffusers import FluxTransformer2DModel

        transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)
    else:
        group = TensorParallelGroup(rank, size)
        transformer = load_transformer(model, group, torch.device("cpu"), torch.bfloat16)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "shard_mb": round(sum(p.numel() * p.element_size() for p in transformer.parameters()) / 1e6, 1),
        "libraries_mb": round(before, 1),
        "peak_mb": round(peak_mb(), 1),
    }


def load_all(model: Path, size: int, *, cold: bool, by_diffusers: bool = False) -> list[dict[str, Any]]:
    """One process per rank, started together."""
    if cold:
        drop_from_page_cache(model / "transformer")
    command = [sys.executable, "-m", "benchmarks.loading", "--model", str(model), "--size", str(size)]
    command += ["--by-diffusers"] if by_diffusers else []
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank of {size} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def drop_from_page_cache(folder: Path) -> None:
    """What was read before must be read from the disk again."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(model: Path, sizes: list[int]) -> dict[str, Any]:
    """All sizes, cold and warm, and diffusers."""
    runs = []
    for size in sizes:
        for cold in (True, False):
            ranks = load_all(model, size, cold=cold)
            for rank in ranks:
                rank["bound_mb"] = round(bound_mb(rank["shard_mb"]), 1)
            within = all(rank["peak_mb"] <= rank["bound_mb"] for rank in ranks)
            runs.append({"tensor_parallel_size": size, "cold": cold, "within_bound": within, "ranks": ranks})
            print(json.dumps(runs[-1]), flush=True)
    (peer,) = load_all(model, 1, cold=False, by_diffusers=True)
    return {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "checkpoint_mb": round(sum(f.stat().st_size for f in (model / "transformer").iterdir()) / 1e6, 1),
        "bound": BOUND,
        "runs": runs,
        "diffusers_from_pretrained": peer,
    }


def table(result: dict[str, Any]) -> str:
    """The result as it stands in docs/models.md: of each run, the rank that needed the most memory."""
    lines = ["| ranks | page cache | shard | peak of a rank | bound | time |", "|---|---|---|---|---|---|"]
    for run in result["runs"]:
        most = max(run["ranks"], key=lambda rank: rank["peak_mb"])
        seconds = max(rank["seconds"] for rank in run["ranks"])
        cells = [f"{most[size]:.0f} MB" for size in ("shard_mb", "peak_mb", "bound_mb")]
        state = "cold" if run["cold"] else "warm"
        lines.append(f"| {run['tensor_parallel_size']} | {state} | {' | '.join(cells)} | {seconds:.1f} s |")
    peer = result["diffusers_from_pretrained"]
    cells = [f"{peer['shard_mb']:.0f} MB", f"{peer['peak_mb']:.0f} MB", "–", f"{peer['seconds']:.1f} s"]
    return "\n".join([*lines, f"| diffusers' `from_pretrained` | warm | {' | '.join(cells)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/flux-dev-eighth"), help="made there when missing")
    parser.add_argument("--scale", choices=SCALES, default="1/8")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--by-diffusers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(load_once(args.model, args.rank, args.size, by_diffusers=args.by_diffusers)))
        return
    if not (args.model / "model_index.json").exists():
        make_checkpoint(MODEL, args.scale, args.model, components=["transformer"])
    result = {"model": MODEL, "scale": args.scale} | measure(args.model, args.sizes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(run["within_bound"] for run in result["runs"]):
        sys.exit(f"a rank needed more than {BOUND}")


if __name__ == "__main__":
    main()
