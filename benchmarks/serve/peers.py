"""What one would write without this service: diffusers' pipeline with diffusers' MagCache, in one Serve deployment.

`CachedPipeline` is also the bare loop that serving is compared with.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from typing import Any

import torch
from diffusers import FluxPipeline, MagCacheConfig
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from benchmarks.serve.load import Wish
from magcache_core import load_profile

TEXT_TOKENS = 32


class CachedPipeline:
    """FluxPipeline on the CPU; its cache is set up anew when the number of steps changes, which diffusers needs."""

    def __init__(self, model: str, profile: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._pipeline: Any = FluxPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        self._pipeline.set_progress_bar_config(disable=True)
        self._profile = load_profile(profile)
        self._steps: int | None = None

    def __call__(self, wishes: list[Wish]) -> list[bytes]:
        """PNG files of wishes with equal size and steps, in one batch."""
        first = wishes[0]
        self._cache_for(first.steps)
        images = self._pipeline(
            [wish.prompt for wish in wishes],
            width=first.width,
            height=first.height,
            num_inference_steps=first.steps,
            max_sequence_length=TEXT_TOKENS,
            generator=[torch.Generator("cpu").manual_seed(wish.seed) for wish in wishes],
        ).images
        return [_png(image) for image in images]

    def _cache_for(self, steps: int) -> None:
        if steps == self._steps:
            return
        transformer = self._pipeline.transformer
        if self._steps is not None:
            transformer.disable_cache()
        profile = self._profile
        transformer.enable_cache(
            MagCacheConfig(
                threshold=profile.threshold,
                max_skip_steps=profile.max_skip_steps,
                retention_ratio=profile.retention_ratio,
                num_inference_steps=steps,
                mag_ratios=list(profile.ratios),
            )
        )
        self._steps = steps


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def _wish(request: Request) -> Wish:
    body = await request.json()
    width, height = map(int, body["size"].split("x"))
    return Wish(body["prompt"], width, height, body["num_inference_steps"], body["seed"])


def _reply(data: bytes) -> Response:
    return JSONResponse({"data": [{"b64_json": base64.b64encode(data).decode("ascii")}]})


class OneAtATime:
    """A deployment that makes one image after another."""

    def __init__(self, model: str, profile: str, threads: int, dtype: str) -> None:
        self._pipeline = CachedPipeline(model, profile, threads, dtype)

    async def __call__(self, request: Request) -> Response:
        """Serve one request."""
        return _reply(self._pipeline([await _wish(request)])[0])


class Batched:
    """The same with ``@serve.batch``: what has equal size and steps among the requests collected shares its passes."""

    def __init__(self, model: str, profile: str, threads: int, dtype: str) -> None:
        self._pipeline = CachedPipeline(model, profile, threads, dtype)

    async def __call__(self, request: Request) -> Response:
        """Serve one request."""
        return _reply(await self._together(await _wish(request)))

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def _together(self, wishes: list[Wish]) -> list[bytes]:
        alike: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for index, wish in enumerate(wishes):
            alike[wish.width, wish.height, wish.steps].append(index)
        files: dict[int, bytes] = {}
        for indices in alike.values():
            files |= zip(indices, self._pipeline([wishes[index] for index in indices]), strict=True)
        return [files[index] for index in range(len(wishes))]


def application(peer: type, model: str, profile: str, threads: int, dtype: str) -> serve.Application:
    """``peer`` as a Serve application that takes all requests and lets none wait elsewhere."""
    deployment: Any = serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=1000)(peer)
    application: serve.Application = deployment.bind(model, profile, threads, dtype)
    return application
