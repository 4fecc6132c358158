"""What the API needs from the rest of the service: one job in, pictures out. No Ray, no web."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from prometheus_client.metrics_core import Metric

from app.engine.families import Family
from app.engine.messages import DenoiseReport, MagCacheOptions

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, eq=False)
class SourcePicture:
    """A picture to edit: ``pixels`` are (height, width, 3), uint8, upright RGB."""

    pixels: np.ndarray


@dataclass(frozen=True)
class ImagesJob:
    """One validated request: nothing is left open but the MagCache options that the profile decides.

    Attributes:
        negative_prompt: present only when true CFG runs.
        n: picture ``i`` of ``n`` uses ``seed + i``.
        output_compression: quality of jpeg and webp, 0 to 100; png ignores it.
        priority: higher goes first.
        deadline_s: seconds from the request's arrival to its last picture; None has all the time.
        partial_images: previews wanted of each picture.
        sources: pictures to edit; none for a picture from a prompt alone.
        strength: image-to-image, in (0, 1]: the share of the steps that run on the one source.
    """

    request_id: str
    prompt: str
    negative_prompt: str | None
    n: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    seed: int
    magcache: MagCacheOptions
    output_format: OutputFormat
    output_compression: int
    priority: int = 0
    deadline_s: float | None = None
    partial_images: int = 0
    sources: tuple[SourcePicture, ...] = ()
    strength: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where picture ``index`` of a request stands.

    Attributes:
        step: steps done, 0 while it waits.
        decision: ``C`` (computed) or ``.`` (reused) of the last step done, empty while it waits.
        eta_s: estimated seconds to the last step.
        queue_position: pictures admitted before it, itself counted; 0 once it runs.
    """

    index: int
    step: int
    steps: int
    decision: str
    eta_s: float
    queue_position: int


@dataclass(frozen=True)
class Preview:
    """What picture ``index`` looks like on the way; ``partial_index`` counts its previews from 0."""

    index: int
    partial_index: int
    data: bytes


@dataclass(frozen=True)
class Picture:
    """One finished picture: the encoded file, how it was denoised, and seconds by phase.

    Attributes:
        source_tokens: of the pictures that the request sent, as the model took them.
    """

    data: bytes
    seed: int
    report: DenoiseReport
    encode_seconds: float
    decode_seconds: float
    total_seconds: float
    source_tokens: int = 0


StreamItem = Progress | Preview | Picture


@dataclass(frozen=True)
class HealthReport:
    """Whether pictures can be made right now; ``details`` is JSON for the operator."""

    ready: bool
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Makes pictures. A cancelled call ends its request; errors are ``ServiceError``s."""

    async def generate(self, job: ImagesJob) -> list[Picture]:
        """The ``job.n`` pictures in the order of their seeds."""

    def stream(self, job: ImagesJob, *, progress: bool) -> AsyncGenerator[StreamItem, None]:
        """What becomes of ``job``, as it happens; closing the generator ends the request.

        First comes a `Progress` for each picture as soon as it is taken, at the end its `Picture`; in between up to
        ``job.partial_images`` times a `Preview` (a late one is left out) and, with ``progress``, more of `Progress`.
        """

    async def cancel(self, request_id: str) -> int:
        """End every request with this id, wherever it is; returns how many pictures that were."""

    async def family(self) -> Family:
        """What kind of model is served."""

    async def health(self) -> HealthReport:
        """Whether every part that a picture needs is up."""

    async def metric_families(self) -> list[Metric]:
        """The coordinators' metric families, to be served together with the API's own."""
