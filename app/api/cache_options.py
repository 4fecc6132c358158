"""How many steps compute: from a request's `quality` and `magcache` and the server's settings to the job's options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from app.api.schemas import MagCacheBody, Quality
from app.errors import InvalidRequestError
from app.messages import MagCacheOptions
from app.settings import Settings
from magcache_core import Profile, ProfileError, fewest_steps, load_profile, pick_profile

_FIELDS = ("mag_threshold", "mag_max_skip_steps", "mag_retention_ratio", "computed_steps", "min_computed_steps")


@dataclass(frozen=True)
class Shape:
    """What of a request decides which profile is its own, and which CFG branches it runs."""

    steps: int
    width: int
    height: int
    branches: Sequence[str]


def cache_options(
    asked: MagCacheBody, quality: Quality, settings: Settings, shape: Shape, warnings: list[str]
) -> MagCacheOptions:
    """The options of a job; what has no effect is added to ``warnings``.

    Raises:
        InvalidRequestError: two fields contradict each other; ``param`` names one, the message both.
    """
    server = settings.magcache
    preset = quality != "auto"
    _check(asked, quality, shape.steps)
    # A preset is a wish for reuse, also where the server computes every step unless asked.
    enabled = preset or (server.enabled if asked.enabled is None else asked.enabled)
    idle = [name for name in _FIELDS if getattr(asked, name) is not None]
    if idle and not enabled:
        warnings.append(f"magcache.{', magcache.'.join(idle)} without effect: magcache.enabled is false")
    skips = server.mag_max_skip_steps if asked.mag_max_skip_steps is None else asked.mag_max_skip_steps
    retention = server.mag_retention_ratio if asked.mag_retention_ratio is None else asked.mag_retention_ratio
    threshold = server.mag_threshold if asked.mag_threshold is None else asked.mag_threshold
    budget = _preset_budget(quality, settings, shape, skips, retention) if preset else asked.computed_steps
    floor = asked.min_computed_steps
    if budget is not None and floor is not None and floor > budget:
        source = f"quality {quality!r}" if preset else "magcache.computed_steps"
        raise InvalidRequestError(
            f"magcache.min_computed_steps is {floor}, above the {budget} steps that {source} computes",
            param="magcache.min_computed_steps",
        )
    return MagCacheOptions(
        enabled=enabled,
        mag_threshold=threshold if budget is None else None,
        mag_max_skip_steps=skips,
        mag_retention_ratio=retention,
        computed_steps=budget,
        min_computed_steps=floor,
    )


def _check(asked: MagCacheBody, quality: Quality, steps: int) -> None:
    for name in ("computed_steps", "min_computed_steps"):
        value = getattr(asked, name)
        if value is not None and value > steps:
            raise InvalidRequestError(
                f"magcache.{name} is {value}; of {steps} steps at most {steps} can be computed",
                param=f"magcache.{name}",
            )
    if asked.computed_steps is not None and asked.mag_threshold is not None:
        raise InvalidRequestError(
            "magcache.mag_threshold and magcache.computed_steps exclude each other: a threshold and a number of "
            "computed steps both decide the schedule",
            param="magcache.mag_threshold",
        )
    if quality == "auto":
        return
    if asked.enabled is False:
        raise InvalidRequestError(
            f"quality {quality!r} computes a share of the steps, and magcache.enabled false computes all; give one",
            param="quality",
        )
    for name in ("computed_steps", "mag_threshold"):
        if getattr(asked, name) is not None:
            raise InvalidRequestError(
                f"quality {quality!r} and magcache.{name} both decide the schedule; give one", param="quality"
            )


def _preset_budget(
    quality: Quality, settings: Settings, shape: Shape, skips: int | None, retention: float | None
) -> int:
    """The preset's share of the steps, or the fewest that the other settings allow where that is more."""
    share: float = getattr(settings.quality, quality)
    try:
        profile = _profile(settings.magcache.profile, settings.model, shape.steps, shape.width, shape.height)
    except ProfileError as error:
        raise InvalidRequestError(
            f"quality {quality!r} needs a MagCache profile, and this model has none; leave quality at auto",
            param="quality",
        ) from error
    fewest = max(
        fewest_steps(profile, shape.steps, branch=branch, max_skip_steps=skips, retention_ratio=retention)
        for branch in shape.branches
    )
    # A share such as 0.1 of 30 steps must not become 4 by rounding in binary.
    return max(math.ceil(share * shape.steps - 1e-9), fewest)


@lru_cache(maxsize=256)
def _profile(named: str | None, model: str, steps: int, width: int, height: int) -> Profile:
    """The profile that the coordinator plans with."""
    return load_profile(named) if named is not None else pick_profile(model, steps, width, height)
