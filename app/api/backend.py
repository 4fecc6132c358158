"""What the API needs from the rest of the service: one job in, images out. No Ray, no web."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from prometheus_client.metrics_core import Metric

from app.engine.families import Family
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.messages.conditioning import TokenCount
from app.messages.jobs import MagCacheOptions
from app.messages.loras import LoraListing, LoraUse
from app.messages.repetitions import Sharing
from app.messages.results import DenoiseReport, Progress

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, eq=False)
class SourcePixels:
    """An image to edit.

    Attributes:
        pixels: (height, width, 3), uint8, upright RGB.
        mask: (height, width), uint8, bright where inpainting paints; None where all of the image may change.
        on_white: the file had transparent parts, which are white now.
    """

    pixels: np.ndarray
    mask: np.ndarray | None = None
    on_white: bool = False


@dataclass(frozen=True)
class RequestIdentity:
    """What tells a repetition of a request.

    Attributes:
        scope: equal for requests that their client calls the same; empty where it does not say.
        body: a digest of the body and of the API key's name.
        keyed: the scope is an Idempotency-Key's, which belongs to one body.
        retried: the client says that it asked before.
    """

    scope: str
    body: str
    keyed: bool
    retried: bool


@dataclass(frozen=True)
class ImagesJob:
    """One validated request: nothing is left open but the MagCache options that the profile decides.

    Attributes:
        negative_prompt: present only when true CFG runs.
        n: image ``i`` of ``n`` uses ``seed + i``.
        output_compression: quality of jpeg and webp, 0 to 100; png ignores it.
        priority: higher goes first.
        deadline_s: seconds from the request's arrival to its last image; None has all the time.
        partial_images: previews wanted of each image.
        sources: images to edit, scaled to what the model takes; none for an image from a prompt alone. With
            ``strength`` it may have a mask. The backend empties the list once they are encoded, so that a request that
            waits does not keep their pixels.
        strength: image-to-image, in (0, 1]: the share of the steps that run on the one source.
        key_name: the name of the API key that the request came with; empty where the service has none.
        sharing: how a repetition finds the images; None where none may.
        repeats: it is a repetition, and its images may be there already.
        loras: adapters of the transformer for all of its images.
        metadata: the file holds its own settings, see `app.api.infotext`.
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
    sources: list[SourcePixels] = field(default_factory=list)
    strength: float | None = None
    key_name: str = ""
    metadata: bool = False
    sharing: Sharing | None = None
    repeats: bool = False
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True)
class Preview:
    """What image ``index`` looks like on the way; ``partial_index`` counts its previews from 0."""

    index: int
    partial_index: int
    data: bytes


@dataclass(frozen=True)
class GeneratedImage:
    """One finished image: the encoded file, how it was denoised, and seconds by phase.

    Attributes:
        source_tokens: of the images that the request sent, as the model took them.
        prompts: tokens of the prompt, and of the negative prompt if there is one.
        joined: it was denoised for an earlier request, which this one repeats.
    """

    data: bytes
    seed: int
    report: DenoiseReport
    encode_seconds: float
    decode_seconds: float
    total_seconds: float
    source_tokens: int = 0
    prompts: tuple[TokenCount, ...] = ()
    joined: bool = False

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, as replies, metrics and traces have them."""
        return {
            "queue_s": self.report.queue_seconds,
            "encode_s": self.encode_seconds,
            "denoise_s": self.report.denoise_seconds,
            "decode_s": self.decode_seconds,
            "total_s": self.total_seconds,
        }


StreamItem = Progress | Preview | GeneratedImage


@dataclass(frozen=True)
class HealthReport:
    """Whether images can be made right now; ``details`` is JSON for the operator."""

    ready: bool
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Makes images. A cancelled call ends its request; errors are ``ServiceError``s."""

    async def reserve(self, job: ImagesJob, identity: RequestIdentity) -> ImagesJob:
        """``job`` with its `Sharing`: where it repeats a request, with that one's, and with its seed.

        Raises:
            InvalidRequestError: the request with the same Idempotency-Key had another body (422).
        """

    async def check(self, job: ImagesJob) -> None:
        """Raise what `generate` would raise at once for want of room or time; ``job`` need not have its sources yet."""

    async def generate(self, job: ImagesJob) -> list[GeneratedImage]:
        """The ``job.n`` images in the order of their seeds."""

    def stream(self, job: ImagesJob, *, progress: bool) -> AsyncGenerator[StreamItem, None]:
        """What becomes of ``job``, as it happens; closing the generator ends the request.

        First comes a `Progress` for each image as soon as it is taken, at the end its `GeneratedImage`; in between up
        to ``job.partial_images`` times a `Preview` (a late one is left out) and, with ``progress``, more of `Progress`.
        """

    async def cancel(self, request_id: str, key_name: str = "") -> int:
        """End every request with this id and key, wherever it is; returns how many images that were.

        Raises:
            ForbiddenError: there are such requests, and other keys made them all.
        """

    async def calibrate(self, job: CalibrationJob) -> CalibrationStatus:
        """Begin a calibration.

        Raises:
            InvalidRequestError: the service is not set up for it, or another one is under way (409).
        """

    async def calibration(self, calibration_id: str) -> CalibrationStatus:
        """How far a calibration is; `InvalidRequestError` (404) where none has this id."""

    async def cancel_calibration(self, calibration_id: str) -> CalibrationStatus:
        """End a calibration, if it has not ended; what it found is kept."""

    async def family(self) -> Family:
        """What kind of model is served."""

    async def loras(self) -> LoraListing:
        """The low-rank adapters that requests may name."""

    async def reload_loras(self) -> LoraListing:
        """Read their folder again, for all new requests."""

    async def health(self) -> HealthReport:
        """Whether every part that an image needs is up."""

    async def metric_families(self) -> list[Metric]:
        """The coordinators' metric families, to be served together with the API's own."""
