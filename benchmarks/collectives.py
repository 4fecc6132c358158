"""Is one all-reduce for a double block's two streams faster than two? ``python -m benchmarks.collectives``

The block stack of flux-tiny on two ranks of this machine, over gloo: as the engine runs it, with one sum for the
outputs of attention's image and text stream, and with a sum for each. The two take turns on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from app.engine.engine import Engine
from app.engine.geometry import Geometry
from app.engine.parallel import JoinedStreams, RowParallelLinear
from app.engine.process_groups import join

MODEL = Path("models/flux-tiny")
TEXT_TOKENS = 32
RANKS = 2
CASES = ((1, 128), (8, 128), (1, 256), (4, 256))
"""Rows and the side of the square images, in pixels."""


def separate(transformer: Any) -> None:
    """Give each stream of each double block its own all-reduce back."""
    for module in transformer.modules():
        if isinstance(module, JoinedStreams):
            attention: Any = module
            attention.__class__ = type(attention).__mro__[2]
            attention.to_out[0].__class__ = attention.to_add_out.__class__ = RowParallelLinear


def _modulation(engine: Engine, rows: int) -> Any:
    """Some modulation, as the engine computes it ahead and hands it to the blocks."""
    return engine._modulation.by_block(torch.randn(rows, engine._modulation.width))


def _rank(rank: int, folder: str, rounds: int, warm_up: int) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", RANKS)
    groups = join(rank, (RANKS, 1, 1), store, torch.device("cpu"), timeout_seconds=300)
    engines = {"joined": Engine(MODEL, groups), "separate": Engine(MODEL, groups)}
    separate(engines["separate"].transformer)
    found = []
    for rows, side in CASES:
        geometry = Geometry.of(side, side)
        width = engines["joined"].transformer.inner_dim
        hidden, context = torch.randn(rows, geometry.tokens, width), torch.randn(rows, TEXT_TOKENS, width)
        modulation, rotary = _modulation(engines["joined"], rows), engines["joined"]._rotary(geometry, TEXT_TOKENS, ())
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        with torch.inference_mode():
            for turn in range(rounds + warm_up):
                for name, engine in engines.items():
                    torch.distributed.barrier()
                    started = time.perf_counter()
                    engine.strategy.blocks(engine.transformer, hidden, context, modulation, rotary)
                    if turn >= warm_up:
                        seconds[name].append(time.perf_counter() - started)
        medians = {f"{name}_ms": round(statistics.median(times) * 1e3, 2) for name, times in seconds.items()}
        found.append({"rows": rows, "side": side, **medians})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's orderly exit may abort when the other rank is gone already


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of each way and case (100)")
    parser.add_argument("--warm-up", type=int, default=5, help="further rounds before them, not measured (5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collectives.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, args.rounds, args.warm_up), nprocs=RANKS)  # type: ignore[no-untyped-call]
        cases: list[dict[str, Any]] = json.loads(Path(folder, "found.json").read_text())
    machine = f"{platform.machine()} CPU, torch {torch.__version__}, gloo, {RANKS} ranks of one thread"
    args.out.write_text(json.dumps({"machine": machine, "rounds": args.rounds, "cases": cases}, indent=1) + "\n")
    for case in cases:
        print(json.dumps(case))


if __name__ == "__main__":
    main()
