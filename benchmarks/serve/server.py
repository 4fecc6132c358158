"""One load on any server with OpenAI's image API, this one or a peer's, so that an operator can compare."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.serve.load import SIZES, STEPS, Target, closed_loop, open_loop, summarise, workload


def measure_server(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load that ``args`` of `add_arguments` describe, after a request per size that is not counted."""
    fields = {**({"model": args.model} if args.model else {}), **args.extra}
    target = Target(args.url.rstrip("/"), fields, os.environ.get(args.key_variable))
    kinds = {"sizes": args.sizes, "steps": args.num_steps}
    (any_wish,) = workload(1, seed=8, **kinds)
    first = [replace(any_wish, width=width, height=height) for width, height in dict.fromkeys(args.sizes)]
    asyncio.run(closed_loop(target, first, clients=1))
    wishes = workload(args.count, seed=1, **kinds)
    if args.rate is None:
        outcomes = asyncio.run(closed_loop(target, wishes, args.clients))
    else:
        outcomes = asyncio.run(open_loop(target, wishes, args.rate, seed=1))
    load = {"clients": args.clients} if args.rate is None else {"rate": args.rate}
    sizes = [f"{width}x{height}" for width, height in args.sizes]
    deadline_s = math.inf if args.deadline_s is None else args.deadline_s
    return {"url": args.url, **load, "sizes": sizes, "steps": args.num_steps, **summarise(outcomes, deadline_s)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``--url``."""
    group = parser.add_argument_group("any server with OpenAI's image API, instead of the comparison")
    group.add_argument("--url", help="for example http://127.0.0.1:8000; prints images per second and latencies")
    group.add_argument("--model", help="the `model` of each request, where the server wants one")
    group.add_argument("--clients", type=int, default=16, help="each asks again as soon as it is answered (16)")
    group.add_argument("--rate", type=float, help="requests per second at random times, instead of --clients")
    group.add_argument("--count", type=int, default=64, help="requests in all (64)")
    group.add_argument("--sizes", type=size, nargs="+", default=SIZES, help="drawn from for each request (flux-tiny's)")
    group.add_argument("--num-steps", type=int, nargs="+", default=STEPS, help="num_inference_steps to draw from")
    group.add_argument(
        "--extra", type=json.loads, default={}, help="further fields, as JSON: '{\"guidance_scale\": 3.5}'"
    )
    group.add_argument("--deadline-s", type=float, help="`in_time` counts the images that come within it")
    group.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        help="environment variable with the API key, if any (OPENAI_API_KEY)",
    )


def size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` as numbers."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1024x1024")
    return int(found[1]), int(found[2])


def lines(figures: dict[str, Any]) -> Sequence[str]:
    """The figures for people."""
    return [
        f"{figures['requests']} requests, {figures['failed']} failed, {figures['seconds']:.1f} s",
        f"{figures['throughput']:.3f} images/s",
        f"latency: p50 {figures['p50_s']:.2f} s, p95 {figures['p95_s']:.2f} s, p99 {figures['p99_s']:.2f} s",
    ]
