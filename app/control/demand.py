"""What the service should calibrate by itself: images that are asked for, and that no measured profile fits. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from app.settings import Settings
from magcache_core import Profile, was_measured_for

OFTEN = 8
"""Images of a kind after which it is worth a calibration; the default image is from the start."""
MOST_KINDS = 256
"""Kinds that are counted at once; the rarest are forgotten."""


@dataclass(frozen=True)
class Measurable:
    """What a profile is measured for: steps, size in pixels, distilled guidance and true CFG, which runs above 1."""

    steps: int
    width: int
    height: int
    guidance_scale: float
    true_cfg_scale: float = 1.0


class CalibrationDemand:
    """Counts what is asked for, and says what to calibrate next."""

    def __init__(self, settings: Settings) -> None:
        sampling = settings.sampling
        self._model = settings.model
        self._default = Measurable(
            sampling.num_inference_steps, sampling.default_width, sampling.default_height, sampling.guidance_scale
        )
        self._asked: Counter[Measurable] = Counter()
        self._given_up: set[Measurable] = set()

    def note(self, kind: Measurable, images: int) -> None:
        """Count ``images`` that were asked for."""
        self._asked[kind] += images
        if len(self._asked) > MOST_KINDS:
            self._asked = Counter(dict(self._asked.most_common(MOST_KINDS // 2)))

    def give_up(self, kind: Measurable) -> None:
        """Leave ``kind`` alone from now on: its calibration failed or was ended."""
        self._given_up.add(kind)

    def next(self, profiles: Iterable[Profile], fewest_steps: int, default_true_cfg: float = 1.0) -> Measurable | None:
        """The default image or else the kind asked for most, if none of ``profiles`` has costs measured for it.

        Args:
            fewest_steps: of a run that can be calibrated.
            default_true_cfg: scale of true CFG in the model's default image.
        """
        measured = [profile for profile in profiles if profile.branch().costs is not None]
        often = [kind for kind, images in self._asked.most_common() if images >= OFTEN]
        for kind in (replace(self._default, true_cfg_scale=default_true_cfg), *often):
            asked = kind.steps, kind.width, kind.height, kind.guidance_scale, kind.true_cfg_scale
            known = any(was_measured_for(profile, self._model, *asked) for profile in measured)
            if not known and kind.steps >= fewest_steps and kind not in self._given_up:
                return kind
        return None
