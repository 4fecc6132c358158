"""Is one all-reduce for a double block's two streams faster than two? ``python -m benchmarks.collectives``

Two ranks on this machine over gloo. ``separate`` is what a double block does: the product of each stream is summed by
itself. ``joined`` lets both products write into one buffer, which is summed once. A timing is of the two products and
their sums, for the attention's output of one block; the two ways take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore
from torch.nn import functional as F

from app.engine.parallel import TensorParallelGroup

RANKS = 2
ROUNDS = 200


@dataclass(frozen=True)
class Case:
    """One block's output projections: rows x tokens of both streams, features in and out of the whole layer."""

    name: str
    rows: int
    image_tokens: int
    text_tokens: int
    dim: int


CASES = (
    Case("flux-tiny, 128x128", 1, 64, 32, 192),
    Case("flux-tiny, 128x128, 8 rows", 8, 64, 32, 192),
    Case("flux-tiny, 256x256", 1, 256, 32, 192),
    Case("FLUX.1's width, 256x256", 1, 256, 512, 3072),
)


def separate(group: TensorParallelGroup, image: torch.Tensor, text: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Two products, two sums."""
    group.sum(F.linear(image, weights[0]))
    group.sum(F.linear(text, weights[1]))


def joined(group: TensorParallelGroup, image: torch.Tensor, text: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Two products into one buffer, one sum."""
    flat = [stream.flatten(0, 1) for stream in (image, text)]
    buffer = torch.empty(sum(map(len, flat)), weights[0].shape[0])
    for part, stream, weight in zip(buffer.split([len(stream) for stream in flat]), flat, weights, strict=True):
        torch.mm(stream, weight.T, out=part)
    group.sum(buffer)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", RANKS)
    group = TensorParallelGroup.join(rank, RANKS, store, torch.device("cpu"), timeout_seconds=300)
    found = []
    for case in CASES:
        width = case.dim // RANKS
        image = torch.randn(case.rows, case.image_tokens, width)
        text = torch.randn(case.rows, case.text_tokens, width)
        weights = [torch.randn(case.dim, width) for _ in range(2)]
        seconds: dict[str, list[float]] = {"separate": [], "joined": []}
        with torch.inference_mode():
            for turn in range(ROUNDS + 10):
                for way in (separate, joined):
                    torch.distributed.barrier()
                    started = time.perf_counter()
                    way(group, image, text, weights)
                    if turn >= 10:
                        seconds[way.__name__].append(time.perf_counter() - started)
        medians = {f"{name}_us": round(statistics.median(times) * 1e6, 1) for name, times in seconds.items()}
        found.append(asdict(case) | medians)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collectives.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=RANKS)  # type: ignore[no-untyped-call]
        cases: list[dict[str, Any]] = json.loads(Path(folder, "found.json").read_text())
    machine = f"{platform.machine()} CPU, torch {torch.__version__}, gloo, {RANKS} ranks of one thread"
    args.out.write_text(json.dumps({"machine": machine, "rounds": ROUNDS, "cases": cases}, indent=1) + "\n")
    for case in cases:
        print(f"{case['name']}: separate {case['separate_us']} us, joined {case['joined_us']} us")


if __name__ == "__main__":
    main()
