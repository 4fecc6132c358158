"""Clients: a mixed workload, asked for in closed loops or at random times, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.pictures import draw_prompts

SIZES = ((128, 128), (128, 128), (160, 96), (96, 160))
STEPS = (28, 28, 20, 12)
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Wish:
    """One image that a client asks for; the guidance is the model's default."""

    prompt: str
    width: int
    height: int
    steps: int
    seed: int

    @property
    def body(self) -> dict[str, Any]:
        """The request's JSON."""
        size = f"{self.width}x{self.height}"
        return {"prompt": self.prompt, "size": size, "num_inference_steps": self.steps, "seed": self.seed}


@dataclass(frozen=True)
class Target:
    """A server: its base URL, fields that each request has beside the wish's own, and the API key."""

    url: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None


@dataclass(frozen=True)
class Outcome:
    """When a request was sent, seconds from the start of its run, and how it went."""

    sent_s: float
    latency_s: float
    status: int


def workload(
    count: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES, steps: Sequence[int] = STEPS
) -> list[Wish]:
    """``count`` wishes of mixed sizes and step counts; each prompt is new, so that no cache of prompts helps."""
    rng = np.random.default_rng([5, seed])
    prompts = draw_prompts(count, held_out=True, seed=1000 + seed).texts
    return [
        Wish(f"{prompt} {index}", *sizes[rng.integers(len(sizes))], steps[rng.integers(len(steps))], index)
        for index, prompt in enumerate(prompts)
    ]


async def closed_loop(target: str | Target, wishes: Sequence[Wish], clients: int) -> list[Outcome]:
    """``clients`` that each ask again as soon as they are answered, until all wishes are asked for."""
    left = iter(wishes)

    async def client(ask: Callable[[Wish], Awaitable[None]]) -> None:
        for wish in left:
            await ask(wish)

    return await _run(target, lambda ask: [client(ask) for _ in range(clients)])


async def open_loop(target: str | Target, wishes: Sequence[Wish], rate: float, seed: int) -> list[Outcome]:
    """Wishes at random times, ``rate`` a second on average (Poisson), whatever becomes of those before."""
    times = np.random.default_rng([6, seed]).exponential(1 / rate, len(wishes)).cumsum()

    async def at(time_s: float, wish: Wish, ask: Callable[[Wish], Awaitable[None]]) -> None:
        await asyncio.sleep(time_s)
        await ask(wish)

    return await _run(target, lambda ask: [at(float(t), wish, ask) for t, wish in zip(times, wishes, strict=True)])


async def _run(
    server: str | Target, clients: Callable[[Callable[[Wish], Awaitable[None]]], list[Any]]
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    target = Target(server) if isinstance(server, str) else server
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    async with httpx.AsyncClient(base_url=target.url, timeout=TIMEOUT_S, limits=limits, headers=headers) as http:
        started = time.perf_counter()

        async def ask(wish: Wish) -> None:
            sent = time.perf_counter()
            reply = await http.post("/v1/images/generations", json={**target.fields, **wish.body})
            outcomes.append(Outcome(sent - started, time.perf_counter() - sent, reply.status_code))

        async with asyncio.TaskGroup() as group:
            for client in clients(ask):
                group.create_task(client)
    return outcomes


@dataclass(frozen=True)
class Summary:
    """Figures of one run; latencies are of the requests that got their image.

    Attributes:
        throughput: images a second, from the first request to the last answer.
        goodput: images within the deadline a second of the same time.
    """

    requests: int
    failed: int
    seconds: float
    throughput: float
    p50_s: float
    p95_s: float
    p99_s: float
    goodput: float
    in_time: float


def summarise(outcomes: Sequence[Outcome], deadline_s: float) -> dict[str, float]:
    """The run's figures, rounded.

    Raises:
        ValueError: no request got an image.
    """
    good = [outcome for outcome in outcomes if outcome.status == 200]
    if not good:
        raise ValueError(f"no image came: statuses {sorted({outcome.status for outcome in outcomes})}")
    seconds = max(outcome.sent_s + outcome.latency_s for outcome in outcomes)
    latencies = np.array([outcome.latency_s for outcome in good])
    in_time = int((latencies <= deadline_s).sum())
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    figures = Summary(
        requests=len(outcomes),
        failed=len(outcomes) - len(good),
        seconds=seconds,
        throughput=len(good) / seconds,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        goodput=in_time / seconds,
        in_time=in_time / len(outcomes),
    )
    return {name: round(float(value), 4) for name, value in asdict(figures).items()}
