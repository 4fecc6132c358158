"""Find profiles: by name, by path, or the nearest one for a request; keep calibrated ones in a folder."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path

from magcache_core.profile_data import Profile, ProfileError, parse, to_json

logger = logging.getLogger(__name__)

SAME_SIZE = math.sqrt(2.0)
"""Images whose numbers of pixels differ by less than this factor are of one size class."""
SAME_GUIDANCE = 0.5
"""Largest difference of distilled guidance scales that count as one."""
SAME_TRUE_CFG = 1.2
"""Scales of true CFG that differ by less than this factor count as one."""


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


def save_profile(profile: Profile, folder: Path) -> Path:
    """Write ``profile`` into ``folder`` under its name; others that read the folder see the old file or the new one."""
    path = folder / f"{profile.name}.json"
    replace_file(path, to_json(profile).encode())
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whose folder is made; who reads it sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    new.write_bytes(content)
    os.replace(new, path)


def stored_profiles(folder: Path) -> list[Profile]:
    """The profiles in ``folder``, by file name; a damaged one is logged and left out."""
    profiles = []
    for path in sorted(folder.glob("*.json")):
        try:
            profiles.append(load_profile(path))
        except ProfileError as error:
            logger.error("%s; it is left out", error)
    return profiles


def was_measured_for(
    profile: Profile,
    model: str,
    steps: int,
    width: int,
    height: int,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
) -> bool:
    """Whether ``profile`` was measured for such requests: same model and steps, about the same size and guidance
    and, if it runs (above 1), true CFG."""
    pixels = abs(math.log(profile.width * profile.height / (width * height)))
    return (
        _model_key(profile.model) == _model_key(model)
        and _cfg_distance(profile, true_cfg_scale) < math.log(SAME_TRUE_CFG)
        and profile.steps == steps
        and pixels < math.log(SAME_SIZE)
        and _guidance_distance(profile, guidance_scale) <= SAME_GUIDANCE
    )


def pick_profile(
    model: str,
    steps: int,
    width: int,
    height: int,
    candidates: Iterable[Profile] | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
) -> Profile:
    """The profile that fits a request best: the model's, nearest in true CFG if it runs, steps, pixels and guidance;
    the pick is logged.

    Args:
        model: model id, as in the profile (compared without case; a path counts by its last part).
        steps: denoising steps of the request.
        width, height: pixels.
        candidates: profiles to choose from, the first of equally near ones; the shipped ones by default.
        guidance_scale: distilled guidance of the request, if it counts.
        true_cfg_scale: scale of the request's true CFG, which runs above 1.

    Raises:
        ProfileError: no candidate is for this model.
    """
    profiles = [load_profile(name) for name in profile_names()] if candidates is None else list(candidates)
    fitting = [profile for profile in profiles if _model_key(profile.model) == _model_key(model)]
    if not fitting:
        known = ", ".join(sorted({profile.model for profile in profiles}))
        raise ProfileError(f"no profile for model {model!r}; there are profiles for {known}")

    def distance(profile: Profile) -> tuple[float, float, float, float]:
        return (
            _cfg_distance(profile, true_cfg_scale),
            abs(math.log(profile.steps / steps)),
            abs(math.log(profile.width * profile.height / (width * height))),
            _guidance_distance(profile, guidance_scale),
        )

    chosen = min(fitting, key=distance)
    logger.info(
        "MagCache profile %s (%d steps, %dx%d) picked for %s at %d steps, %dx%d",
        chosen.name, chosen.steps, chosen.width, chosen.height, model, steps, width, height,
    )  # fmt: skip
    return chosen


def _guidance_distance(profile: Profile, guidance_scale: float | None) -> float:
    known = profile.guidance_scale
    return 0.0 if known is None or guidance_scale is None else abs(known - guidance_scale)


def _cfg_distance(profile: Profile, true_cfg_scale: float) -> float:
    """How far scales of true CFG are apart, as a logarithm; infinite where only one of the two runs it."""
    if profile.true_cfg_scale is None or true_cfg_scale <= 1:
        return 0.0 if profile.true_cfg_scale is None and true_cfg_scale <= 1 else math.inf
    return abs(math.log(profile.true_cfg_scale / true_cfg_scale))


def _model_key(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1].lower()
