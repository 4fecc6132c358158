"""Find profiles: by name, by path, or the nearest one for a model, step count and size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path

from magcache_core.profile_data import Profile, ProfileError, parse

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def profile_names() -> tuple[str, ...]:
    """Names of the profiles that ship with the package."""
    folder = resources.files("magcache_core") / "profiles"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a profile by the name of a shipped one (``flux.1-dev``) or by path.

    Raises:
        ProfileError: no such name or file (the message lists the names), or the file is damaged.
    """
    if isinstance(name_or_path, str) and name_or_path in profile_names():
        return _shipped(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise ProfileError(
            f"no profile {str(name_or_path)!r}: no such file, and shipped are {', '.join(profile_names())}"
        )
    return parse(path.read_text(encoding="utf-8"), str(path))


@lru_cache(maxsize=32)
def _shipped(name: str) -> Profile:
    file = resources.files("magcache_core") / "profiles" / f"{name}.json"
    return parse(file.read_text(encoding="utf-8"), f"{name}.json")


def pick_profile(
    model: str, steps: int, width: int, height: int, candidates: Iterable[Profile] | None = None
) -> Profile:
    """The profile that fits a request best: the model's, nearest in steps, then in pixels; the pick is logged.

    Args:
        model: model id, as in the profile (compared without case; a path counts by its last part).
        steps: denoising steps of the request.
        width, height: pixels.
        candidates: profiles to choose from; the shipped ones by default.

    Raises:
        ProfileError: no candidate is for this model.
    """
    profiles = [load_profile(name) for name in profile_names()] if candidates is None else list(candidates)
    fitting = [profile for profile in profiles if _model_key(profile.model) == _model_key(model)]
    if not fitting:
        known = ", ".join(sorted({profile.model for profile in profiles}))
        raise ProfileError(f"no profile for model {model!r}; there are profiles for {known}")

    def distance(profile: Profile) -> tuple[float, float, str]:
        return (
            abs(math.log(profile.steps / steps)),
            abs(math.log(profile.width * profile.height / (width * height))),
            profile.name,
        )

    chosen = min(fitting, key=distance)
    logger.info(
        "MagCache profile %s (%d steps, %dx%d) picked for %s at %d steps, %dx%d",
        chosen.name, chosen.steps, chosen.width, chosen.height, model, steps, width, height,
    )  # fmt: skip
    return chosen


def _model_key(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1].lower()
