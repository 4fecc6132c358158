"""The systems that are compared, each behind Ray Serve on this machine with the same number of threads."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve

from app.main import build
from app.settings import Settings
from benchmarks.serve.load import Wish
from benchmarks.serve.peers import Batched, OneAtATime, application
from magcache_core import load_profile
from scripts.ray_start import start_ray
from scripts.serve_process import free_port

MODEL = Path("models/flux-tiny").resolve()
PROFILE = "flux-tiny"
THREADS = 2
CONFIG = Path("deployments/flux-tiny.yaml")


@dataclass(frozen=True)
class System:
    """One thing to measure: a name for tables and plots, and how to make its Serve application in some precision."""

    name: str
    label: str
    application: Callable[[str], serve.Application]


def ours(tensor_parallel_size: int, groups: int, dtype: str, model: Path = MODEL) -> serve.Application:
    """This service with the threshold rule that diffusers has, so that both compute the same steps.

    The threads are divided among the ranks of all ``groups``.
    """
    args = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]["args"]
    profile = load_profile(PROFILE)
    rule = {
        "profile": PROFILE,  # also for a model in another folder
        "mag_threshold": profile.threshold,
        "mag_max_skip_steps": profile.max_skip_steps,
        "mag_retention_ratio": profile.retention_ratio,
    }
    args |= {
        "model": str(model),
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "num_replicas": groups,
        "threads_per_rank": THREADS // (tensor_parallel_size * groups),
        "log_level": "WARNING",
        "magcache": args["magcache"] | rule,
    }
    return build(Settings(**args))


def _peer(kind: type, dtype: str) -> serve.Application:
    return application(kind, str(MODEL), PROFILE, THREADS, dtype)


SYSTEMS = (
    System("pipeline", "diffusers, one at a time", lambda dtype: _peer(OneAtATime, dtype)),
    System("batched", "diffusers, @serve.batch", lambda dtype: _peer(Batched, dtype)),
    System("ours-tp1", "this service, tp 1, 2 groups", lambda dtype: ours(1, groups=2, dtype=dtype)),
    System("ours-tp2", "this service, tp 2", lambda dtype: ours(2, groups=1, dtype=dtype)),
)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray of its own with Serve's proxy on a free port; yields the URL."""
    port = free_port()
    # Room for two systems at once; what counts is what the machine has, and each system's own threads.
    start_ray(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@contextlib.contextmanager
def running(application: serve.Application, name: str = "measured", route: str = "/") -> Iterator[None]:
    """``application`` below ``route`` of the cluster's URL."""
    serve.run(application, name=name, route_prefix=route)
    try:
        yield
    finally:
        serve.delete(name)


def ask(url: str, wish: Wish, **extra: Any) -> dict[str, Any]:
    """The first image of one reply, without its file."""
    reply = httpx.post(f"{url}/v1/images/generations", json=wish.body | extra, timeout=180.0)
    reply.raise_for_status()
    image: dict[str, Any] = reply.json()["data"][0]
    del image["b64_json"]
    return image


def metric(url: str, name: str) -> float:
    """A metric of ours, summed over its labels; 0 before its first sample."""
    text = httpx.get(f"{url}/metrics", timeout=30.0).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def settle(url: str, wish: Wish, attempts: int = 60) -> None:
    """Return when the application answers."""
    for _ in range(attempts):
        with contextlib.suppress(httpx.HTTPError):
            ask(url, wish)
            return
        time.sleep(1.0)
    raise RuntimeError(f"{url} did not answer within {attempts} attempts")
