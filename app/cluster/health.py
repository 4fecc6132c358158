"""What ``/health`` says: which of a service's parts answer, looked at once a second at most."""

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.api.backend import HealthReport
from app.cluster.coordinators import Coordinators
from app.cluster.handles import ANSWER_SECONDS, answers_of_all
from app.settings import Settings

if TYPE_CHECKING:
    from app.components.prompt_encoder import PromptEncoder
    from app.components.vae import ImageDecoder

LOOK_S = 1.0
"""How long a look at the parts answers for /health."""


class Health:
    """Asks the encoder, the decoder, the replicas and the coordinators whether they can work."""

    def __init__(
        self,
        settings: Settings,
        encoder: "PromptEncoder",
        replica: DeploymentHandle,
        decoder: "ImageDecoder",
        coordinators: Coordinators,
    ) -> None:
        self._settings = settings
        self._coordinators = coordinators
        self._encoder = encoder
        self._replica = replica
        self._decoder = decoder
        self._look: asyncio.Task[HealthReport] | None = None
        self._looked_s = -float("inf")

    async def report(self) -> HealthReport:
        """Ready when the encoder, the decoder and at least one whole group are."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked_s > LOOK_S):
            self._look = asyncio.create_task(self._look_around())
        return await asyncio.shield(self._look)

    async def _look_around(self) -> HealthReport:
        groups, starts, troubles, encoder, decoder = await asyncio.gather(
            self._coordinators.call("ready"),
            self._coordinators.call("starting"),
            answers_of_all(self._replica, "trouble"),
            _is_up(self._encoder),
            _is_up(self._decoder),
        )
        self._looked_s = time.monotonic()
        return HealthReport(
            ready=any(groups) and encoder and decoder,
            details={
                "model": self._settings.model_name,
                "groups_ready": sum(groups),
                "groups": max(len(groups), self._settings.num_replicas),
                "encoder_ready": encoder,
                "decoder_ready": decoder,
                "troubles": [trouble for trouble in troubles if trouble is not None],
                "starting": [asdict(start) for start in starts if start is not None],
            },
        )


async def _is_up(part: "PromptEncoder | ImageDecoder") -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await part.ping()
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        return False
    return True
