"""Actors that stand for the service's own; a module apart, so that their processes import little more than Ray."""

from __future__ import annotations

import asyncio
import os

import ray


@ray.remote(num_cpus=0)
class Owner:
    """Stands for a rank: owns latents, and can be killed."""

    def make(self) -> list[ray.ObjectRef]:
        import torch

        return [ray.put(torch.full((64, 64), 0.5))]

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class Named:
    """Stands for a coordinator; a running service's own has no method ``greet``."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def greet(self, greeting: str) -> str:
        if self._name == "hanging":
            await asyncio.Event().wait()
        return f"{greeting} from {self._name}"
