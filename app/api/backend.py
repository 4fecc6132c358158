"""What the API needs from the rest of the service: one job in, pictures out. No Ray, no web."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prometheus_client.metrics_core import Metric

from app.engine.messages import DenoiseReport, MagCacheOptions

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class ImagesJob:
    """One validated request: nothing is left open but the MagCache options that the profile decides.

    Attributes:
        negative_prompt: present only when true CFG runs.
        n: picture ``i`` of ``n`` uses ``seed + i``.
        output_compression: quality of jpeg and webp, 0 to 100; png ignores it.
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


@dataclass(frozen=True)
class Picture:
    """One finished picture: the encoded file, how it was denoised, and seconds by phase."""

    data: bytes
    seed: int
    report: DenoiseReport
    encode_seconds: float
    decode_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class HealthReport:
    """Whether pictures can be made right now; ``details`` is JSON for the operator."""

    ready: bool
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Makes pictures. A cancelled call ends its request; errors are ``ServiceError``s."""

    async def generate(self, job: ImagesJob) -> list[Picture]:
        """The ``job.n`` pictures in the order of their seeds."""

    async def health(self) -> HealthReport:
        """Whether every part that a picture needs is up."""

    async def metric_families(self) -> list[Metric]:
        """The coordinators' metric families, to be served together with the API's own."""
