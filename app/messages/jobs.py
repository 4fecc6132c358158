"""An image to denoise, as a request asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.messages.calibration import CalibrationRun
from app.messages.loras import LoraUse
from app.messages.repetitions import Sharing

COND = "cond"
UNCOND = "uncond"


@dataclass(frozen=True)
class ImageKind:
    """Images that the quality guard holds to one number of computed steps.

    Attributes:
        profile: ``NAME@VERSION`` of the profile that plans them.
        steps: denoising steps.
        guided: whether true CFG runs.
    """

    profile: str
    steps: int
    guided: bool


@dataclass(frozen=True)
class MagCacheOptions:
    """One request's MagCache settings; ``None`` takes the profile's or the server's value.

    ``computed_steps`` asks for the best plan with that many computed steps; the threshold is then ignored.
    ``computed_share`` asks for that share of the steps, or for the fewest that the other settings allow if more.
    ``floor_db`` goes before it: the fewest steps whose trials reached this mean PSNR, where there are such trials.
    ``min_computed_steps`` is the fewest that a deadline or load may lower the computed steps to.
    ``client_chose``: the request names its schedule itself, which is lowered only as far as it allows.
    ``guard_budgets``: computed steps that the quality guard chose, by kind of image; each other kind has its own.
    """

    enabled: bool = True
    mag_threshold: float | None = None
    mag_max_skip_steps: int | None = None
    mag_retention_ratio: float | None = None
    computed_steps: int | None = None
    min_computed_steps: int | None = None
    computed_share: float | None = None
    floor_db: float | None = None
    client_chose: bool = False
    guard_budgets: tuple[tuple[ImageKind, int], ...] = ()


def first_step(steps: int, strength: float | None) -> int:
    """The first step of image-to-image in a schedule of ``steps``; diffusers skips the same ones."""
    return 0 if strength is None else min(int(max(steps - steps * strength, 0)), steps - 1)


def steps_of_share(share: float, steps: int) -> int:
    """The fewest of ``steps`` that are at least ``share`` of them, whatever a float's last digits say."""
    return math.ceil(share * steps - 1e-9)


@dataclass(frozen=True)
class DenoiseJob:
    """One image to denoise, number ``index`` of its HTTP request. ``row_id`` is unique in the service.

    True CFG, with its second branch, runs when ``true_cfg_scale`` is above 1, as in diffusers.

    Attributes:
        priority: higher goes first.
        deadline_s: seconds from the job's arrival at the coordinator to its last step; None for no deadline.
        partial_images: number of previews (x0 estimates), evenly spread over the steps.
        strength: image-to-image, in (0, 1]: the share of the steps that run on the source; None starts from noise.
        key_name: the name of the API key that the request came with; empty where the service has none.
        retry_key: equal for an image and its repetition in a later request; empty where that is not known.
        sharing: how a repetition of the request finds the image; None where none may.
        computing: the steps that compute in some branch, counted from the job's first; None when any of them may.
        source_tokens: tokens of the reference images, which every step reads beside the image's own.
        calibration: what the row does instead of following ``magcache``, where it is in the background.
        loras: adapters of the transformer, which add up; each name once.
    """

    row_id: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    seed: int
    magcache: MagCacheOptions = MagCacheOptions()
    request_id: str = ""
    index: int = 0
    priority: int = 0
    deadline_s: float | None = None
    partial_images: int = 0
    strength: float | None = None
    source_tokens: int = 0
    key_name: str = ""
    retry_key: str = ""
    sharing: Sharing | None = None
    computing: tuple[int, ...] | None = None
    calibration: CalibrationRun | None = None
    loras: tuple[LoraUse, ...] = ()

    @property
    def first_step(self) -> int:
        """The step of the whole schedule at which this job begins."""
        return first_step(self.num_inference_steps, self.strength)

    @property
    def steps_to_run(self) -> int:
        """Number of steps of this job: all, or with ``strength`` those from `first_step` on."""
        return self.num_inference_steps - self.first_step

    @property
    def is_recorded(self) -> bool:
        """Whether its steps are measured for a calibration."""
        return self.calibration is not None and self.calibration.record

    @property
    def branches(self) -> tuple[str, ...]:
        """The CFG branches that each step evaluates."""
        return (COND, UNCOND) if self.true_cfg_scale > 1.0 else (COND,)
