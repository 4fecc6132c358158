"""This service against what one would write instead, over HTTP on this machine: ``python -m benchmarks.serving``.

``--url URL`` instead runs one load on a server that is there already, this one or any other with OpenAI's image API.

flux-tiny, mixed sizes and step counts, the same threads and the same computed steps everywhere: diffusers' pipeline
with diffusers' MagCache in one Serve deployment, one image at a time and with ``@serve.batch``, and this service with
two groups of one rank and with one of two. Closed loops and Poisson arrivals; the two ratios that were to be reached
come from loops that the pipeline and the service run in turns. Beside them the bare pipeline without Serve, and what
MagCache saves in the denoising phase on flux-tiny and on a random checkpoint of 160 million parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import ray
import torch

from benchmarks.serve.checkpoint import write_checkpoint
from benchmarks.serve.load import closed_loop, open_loop, summarise, workload
from benchmarks.serve.peers import CachedPipeline
from benchmarks.serve.phases import speed_up
from benchmarks.serve.plots import draw
from benchmarks.serve.server import add_arguments, lines, measure_server
from benchmarks.serve.systems import MODEL, PROFILE, SYSTEMS, THREADS, System, cluster, ours, running, settle
from benchmarks.serve.tables import fill, markdown

PAIR = {"pipeline": "/pipeline", "ours-tp1": "/"}
"""The two systems that are divided by each other, and below which routes they are up together."""
# An image is in time when it comes within so many times what the bare pipeline takes for one.
DEADLINE_FACTOR = 5.0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        closed: clients of each closed loop, and how many requests they share.
        open_seconds: length of each run with Poisson arrivals.
        open_loads: arrival rates, as multiples of what the bare pipeline makes in a second.
        turns: how often the first and the third closed loop are run in turns by the pipeline and the service.
        repetitions: images of each kind that the speed-up is the median of.
        warm_up: images that a system makes before it is measured.
        large: shape of the random checkpoint, where it differs from `BLOCKS`.
        alone: names of the systems measured beside `PAIR`, each while it alone is up.
    """

    closed: tuple[tuple[int, int], ...] = ((1, 24), (4, 48), (16, 96), (64, 192))
    open_seconds: float = 10.0
    open_loads: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    turns: int = 3
    repetitions: int = 15
    warm_up: int = 16
    large: tuple[tuple[str, int], ...] = ()
    alone: tuple[str, ...] = tuple(system.name for system in SYSTEMS if system.name not in PAIR)


QUICK = Effort(
    closed=((1, 2), (2, 4)),
    open_seconds=1.0,
    open_loads=(0.5,),
    turns=1,
    repetitions=1,
    warm_up=2,
    large=(("num_layers", 1), ("num_single_layers", 1)),
    alone=(),
)


def bare_loop(count: int, dtype: str) -> dict[str, float]:
    """The pipeline alone, in a process like those that serve: one image after another, PNG files included."""

    class Loop:
        def __init__(self) -> None:
            self._pipeline = CachedPipeline(str(MODEL), PROFILE, THREADS, dtype)

        def run(self, seed: int) -> list[float]:
            seconds = []
            for wish in workload(count, seed):
                started = time.perf_counter()
                self._pipeline([wish])
                seconds.append(time.perf_counter() - started)
            return seconds

    actor: Any = ray.remote(num_cpus=1)(Loop).remote()
    ray.get(actor.run.remote(0))
    seconds = ray.get(actor.run.remote(1))
    ray.kill(actor)
    return {"p50_s": round(statistics.median(seconds), 4), "throughput": round(len(seconds) / sum(seconds), 4)}


def warm_up(url: str, images: int) -> None:
    """Wait for the system at ``url``, and have it make ``images`` in batches of several sizes."""
    settle(url, workload(1, seed=9)[0])
    asyncio.run(closed_loop(url, workload(images, seed=2), clients=4))


def measure(url: str, effort: Effort, bare: dict[str, float]) -> dict[str, Any]:
    """All loads on the system that listens at ``url``."""
    deadline_s = DEADLINE_FACTOR * bare["p50_s"]
    warm_up(url, effort.warm_up)
    closed = []
    for clients, count in effort.closed:
        outcomes = asyncio.run(closed_loop(url, workload(count, seed=1), clients))
        closed.append({"clients": clients, **summarise(outcomes, deadline_s)})
    arrivals = []
    for load in effort.open_loads:
        rate = load * bare["throughput"]
        wishes = workload(max(2, round(rate * effort.open_seconds)), seed=4)
        outcomes = asyncio.run(open_loop(url, wishes, rate, seed=4))
        arrivals.append({"load": load, "rate": round(rate, 3), **summarise(outcomes, deadline_s)})
    return {"closed": closed, "open": arrivals}


def in_turns(urls: Mapping[str, str], effort: Effort) -> list[dict[str, float]]:
    """One client's latency and many clients' throughput of the systems of `PAIR` at ``urls``, in that order.

    A shared machine may be half as fast a minute later, so only what was measured side by side is divided.
    """
    one, many = effort.closed[0], effort.closed[min(len(effort.closed) - 1, 2)]  # 16 clients in a full run
    rounds = []
    for _ in range(effort.turns):
        figures: dict[str, float] = {}
        for clients, count in (one, many):
            for name, base in urls.items():
                outcomes = asyncio.run(closed_loop(base, workload(count, seed=1), clients))
                summary = summarise(outcomes, math.inf)
                figures[f"{name}, {clients} clients"] = summary["p50_s" if clients == one[0] else "throughput"]
        pipeline_s, ours_s, pipeline_rate, ours_rate = figures.values()
        figures |= {"latency": round(ours_s / pipeline_s, 3), "throughput": round(ours_rate / pipeline_rate, 3)}
        print("in turns", json.dumps(figures), flush=True)
        rounds.append(figures)
    return rounds


def targets(document: dict[str, Any]) -> dict[str, Any]:
    """The figures that were to be reached, with what was."""
    phases = document["denoising"]
    latency, throughput = (
        statistics.median(turn[name] for turn in document["in_turns"]) for name in ("latency", "throughput")
    )
    wanted: Sequence[tuple[str, float, str, float]] = (
        ("latency of one client, ours / pipeline", latency, "<=", 1.0),
        ("throughput, ours / pipeline", throughput, ">=", 2.0),
        ("speed-up / possible, flux-tiny", phases["flux-tiny"]["ratio"], ">=", 0.85),
        ("speed-up / possible, random-160m", phases["random-160m"]["ratio"], ">=", 0.95),
        ("control-plane gap / computed step, flux-tiny", phases["flux-tiny"]["gap_share"], "<=", 0.05),
    )
    return {
        name: {
            "measured": round(value, 3),
            "wanted": f"{relation} {bound:g}",
            "reached": value <= bound if relation == "<=" else value >= bound,
        }
        for name, value, relation, bound in wanted
    }


def run(effort: Effort, dtype: str) -> dict[str, Any]:
    """Everything, one system after another."""
    started = time.perf_counter()
    document: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, {dtype}",
        "software": f"torch {torch.__version__}, diffusers {diffusers.__version__}, Ray {ray.__version__}",
        "threads": THREADS,
        "effort": asdict(effort),
        "denoising": {},
    }
    with cluster() as url, tempfile.TemporaryDirectory() as folder:
        document["bare"] = bare = bare_loop(effort.closed[0][1], dtype)
        document["deadline_s"] = round(DEADLINE_FACTOR * bare["p50_s"], 3)
        print("bare pipeline", json.dumps(bare), flush=True)
        systems = {system.name: system for system in SYSTEMS}
        measured: dict[str, Any] = {}

        def measure_one(system: System, base: str) -> None:
            measured[system.name] = {"label": system.label, **(figures := measure(base, effort, bare))}
            for figure in (*figures["closed"], *figures["open"]):
                print(system.label, json.dumps(figure), flush=True)

        with ExitStack() as pair:
            urls = {name: url + route.rstrip("/") for name, route in PAIR.items()}
            for name, route in PAIR.items():
                pair.enter_context(running(systems[name].application(dtype), name, route))
            for name, base in urls.items():
                measure_one(systems[name], base)
            document["denoising"]["flux-tiny"] = speed_up(urls["ours-tp1"], effort.repetitions)
            document["in_turns"] = in_turns(urls, effort)
        for name in effort.alone:
            with running(systems[name].application(dtype)):
                measure_one(systems[name], url)
        document["systems"] = {name: measured[name] for name in systems if name in measured}
        large = Path(folder) / "random"
        parameters = write_checkpoint(MODEL, large, **dict(effort.large))
        with running(ours(1, 1, dtype, large)):
            settle(url, workload(1, seed=9)[0])
            document["denoising"]["random-160m"] = {"parameters": parameters, **speed_up(url, effort.repetitions)}
    document["targets"] = targets(document)
    document["seconds"] = round(time.perf_counter() - started, 1)
    return document


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few requests: does everything run?")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="precision of all systems")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/serving.png"))
    parser.add_argument("--page", type=Path, help="Markdown file to put the tables into, such as docs/performance.md")
    add_arguments(parser)
    args = parser.parse_args()
    if args.url is not None:
        figures = measure_server(args)
        print("\n".join(lines(figures)))
        print(json.dumps(figures))
        return 0
    document = run(QUICK if args.quick else Effort(), args.dtype)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(document, args.plot)
    if args.page is not None:
        fill(args.page, markdown(document))
    print("denoising", json.dumps(document["denoising"]))
    for name, target in document["targets"].items():
        word = "reached" if target["reached"] else "MISSED"
        print(f"{word}: {name}: {target['measured']} (wanted {target['wanted']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
