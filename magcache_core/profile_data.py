"""A model's calibrated profile: immutable data, and reading and writing it as versioned JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from magcache_core.config import ConfigError, MagCacheConfig, ratio_tuple
from magcache_core.costs import CostTable
from magcache_core.plan_data import COMPUTE, REUSE, Trial
from magcache_core.resample import interpolate, nearest_index, resample_over_sigma
from magcache_core.reuse import REUSE_MODES

FORMAT = "magcache-profile"
VERSION = 1
RESAMPLING = ("nearest", "sigma")


class ProfileError(ValueError):
    """A profile file is missing, damaged, of another version, or not there for the model; the message says which."""


@dataclass(frozen=True)
class BranchCurve:
    """One CFG branch's calibration, one value per step; names as the reference implementations log them.

    Attributes:
        norm_ratios: mean over tokens of |R_i| / |R_(i-1)|, R being the block stack's residual; the first is 1.
        norm_stds: standard deviation of the same over tokens; empty when not known.
        cos_dises: mean over tokens of 1 - cosine(R_i, R_(i-1)); empty when not known.
        costs: what reuse costs, measured on uncached runs; None when only magnitudes are known.
    """

    norm_ratios: tuple[float, ...]
    norm_stds: tuple[float, ...] = ()
    cos_dises: tuple[float, ...] = ()
    costs: CostTable | None = None

    def tail(self, first: int) -> BranchCurve:
        """The curve of a run that begins at step ``first``; see `Profile.tail`."""
        return BranchCurve(
            # As in any run, no ratio leads to the first step.
            norm_ratios=(1.0, *self.norm_ratios[first + 1 :]),
            norm_stds=self.norm_stds[first:],
            cos_dises=self.cos_dises[first:],
            costs=None if self.costs is None else self.costs.tail(first),
        )


@dataclass(frozen=True)
class Profile:
    """What is known about one model's residuals at one step count and size.

    Attributes:
        name: the profile's name, e.g. ``flux.1-dev``.
        model: id of the model that it was measured on.
        transformer: that model's transformer class.
        steps: denoising steps of the measured runs.
        width, height: pixels of the measured images.
        guidance_scale: distilled guidance of the measured runs; None when not known.
        true_cfg_scale: scale of the measured runs' true CFG; None when none ran.
        sigmas: noise level of each step, falling, ``steps`` values; empty when not known.
        branches: curves by CFG branch; ``cond`` is always there.
        protected_steps: steps that always compute, as indices into the curve.
        threshold, max_skip_steps, retention_ratio: recommended settings.
        reuse: recommended reuse mode of the threshold rule.
        budget: recommended number of computed steps of a plan at ``steps`` steps; None when plans aren't recommended.
        trials: the best schedule that was found by running it, by rising number of computed steps; empty when none was.
        provenance: where the numbers come from, as free text and version fields.
    """

    name: str
    model: str
    transformer: str
    steps: int
    width: int
    height: int
    branches: Mapping[str, BranchCurve]
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    sigmas: tuple[float, ...] = ()
    protected_steps: tuple[int, ...] = ()
    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1
    reuse: str = "residual"
    budget: int | None = None
    trials: tuple[Trial, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def version(self) -> str:
        """A hash of all that the profile says: equal versions plan alike."""
        return hashlib.sha256(to_json(self).encode()).hexdigest()[:12]

    @property
    def ratios(self) -> tuple[float, ...]:
        """The curve of the conditional branch."""
        return self.branches["cond"].norm_ratios

    def branch(self, name: str = "cond") -> BranchCurve:
        """The curve of a CFG branch; the conditional one where this branch wasn't measured."""
        return self.branches.get(name, self.branches["cond"])

    def config(
        self,
        num_inference_steps: int | None = None,
        *,
        branch: str = "cond",
        resample: str = "nearest",
        sigmas: Sequence[float] | None = None,
        **settings: Any,
    ) -> MagCacheConfig:
        """Settings for a request, the profile's recommended ones where none is given.

        Args:
            num_inference_steps: the request's steps; the profile's by default.
            branch: CFG branch.
            resample: how another step count is served: ``nearest`` index, or ``sigma`` to interpolate the cumulative
                log-magnitude over sigma (closer to a measured curve, but no better in images: docs/magcache.md).
            sigmas: the request's noise levels, needed for ``sigma``.
            settings: any other field of `MagCacheConfig` (or its aliases); None means the profile's.

        Raises:
            ConfigError: a setting is out of range, or ``sigma`` resampling lacks sigmas.
        """
        steps = self.steps if num_inference_steps is None else num_inference_steps
        chosen: dict[str, Any] = {
            "threshold": self.threshold,
            "max_skip_steps": self.max_skip_steps,
            "retention_ratio": self.retention_ratio,
            "mag_ratios": self.branch(branch).norm_ratios,
            "protected_steps": self.protected_steps,
        }
        if resample not in RESAMPLING:
            raise ConfigError("resample", resample, f"one of {', '.join(RESAMPLING)}")
        if resample == "sigma":
            chosen |= self._over_sigma(self.branch(branch).norm_ratios, steps, sigmas)
        chosen |= {name: value for name, value in settings.items() if value is not None}
        return MagCacheConfig(num_inference_steps=steps, **chosen)

    def _over_sigma(
        self, ratios: tuple[float, ...], steps: int, sigmas: Sequence[float] | None
    ) -> dict[str, tuple[float, ...] | tuple[int, ...]]:
        if not self.sigmas or sigmas is None or len(sigmas) < steps:
            raise ConfigError(
                "sigmas", sigmas, f"{steps} noise levels, and known to the profile, to resample over sigma"
            )
        target = [float(s) for s in sigmas[:steps]]
        source_index = [interpolate(self.sigmas, range(self.steps), sigma) for sigma in target]
        protected = tuple(i for i, index in enumerate(source_index) if round(index) in self.protected_steps)
        return {"mag_ratios": resample_over_sigma(ratios, self.sigmas, target), "protected_steps": protected}

    def tail(self, first_step: int, num_inference_steps: int) -> Profile:
        """The profile of a run that enters a schedule of ``num_inference_steps`` late, as image-to-image does.

        Residuals behave by noise level, so such a run takes the end of the curve, from the step nearest to
        ``first_step``; its recommended budget is its share of the whole run's.
        """
        first = nearest_index(first_step, num_inference_steps, self.steps) if first_step else 0
        if first == 0:
            return self
        steps = self.steps - first
        return replace(
            self,
            steps=steps,
            sigmas=self.sigmas[first:],
            branches={name: curve.tail(first) for name, curve in self.branches.items()},
            protected_steps=tuple(step - first for step in self.protected_steps if step >= first),
            budget=None if self.budget is None else math.ceil(self.budget * steps / self.steps),
            trials=(),
        )


def to_json(profile: Profile) -> str:
    """The profile as JSON text, versioned; `parse` reads it back."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": profile.name,
        "model": profile.model,
        "transformer": profile.transformer,
        "steps": profile.steps,
        "width": profile.width,
        "height": profile.height,
        "guidance_scale": profile.guidance_scale,
        "true_cfg_scale": profile.true_cfg_scale,
        "sigmas": list(profile.sigmas),
        "protected_steps": list(profile.protected_steps),
        "defaults": {
            "threshold": profile.threshold,
            "max_skip_steps": profile.max_skip_steps,
            "retention_ratio": profile.retention_ratio,
            "reuse": profile.reuse,
            "budget": profile.budget,
        },
        "branches": {
            name: {
                "norm_ratios": list(curve.norm_ratios),
                "norm_stds": list(curve.norm_stds),
                "cos_dises": list(curve.cos_dises),
                "costs": None if curve.costs is None else curve.costs.to_document(),
            }
            for name, curve in profile.branches.items()
        },
        "trials": [[trial.schedule, trial.reuse, float(f"{trial.error:.4g}")] for trial in profile.trials],
        "provenance": dict(profile.provenance),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse(text: str, source: str) -> Profile:
    """Read a profile from JSON text.

    Args:
        text: what `to_json` wrote.
        source: name of the file, for the error message.

    Raises:
        ProfileError: not JSON, not a profile, of another version, or with missing or inconsistent fields.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"profile {source} is damaged: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f"{source} is not a MagCache profile (its format is not {FORMAT!r})")
    if document.get("version") != VERSION:
        raise ProfileError(f"profile {source} has version {document.get('version')!r}; this library reads {VERSION}")
    try:
        return _profile(document)
    except ProfileError as error:
        raise ProfileError(f"profile {source} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"profile {source} is damaged: {type(error).__name__}: {error}") from error


def _profile(document: dict[str, Any]) -> Profile:
    steps = int(document["steps"])
    branches = {name: _branch(name, value, steps) for name, value in document["branches"].items()}
    if "cond" not in branches:
        raise ProfileError("it has no 'cond' branch")
    defaults = document["defaults"]
    sigmas = tuple(float(s) for s in document["sigmas"])
    if sigmas and len(sigmas) != steps:
        raise ProfileError(f"it has {len(sigmas)} sigmas for {steps} steps")
    profile = Profile(
        name=document["name"],
        model=document["model"],
        transformer=document["transformer"],
        steps=steps,
        width=int(document["width"]),
        height=int(document["height"]),
        guidance_scale=document["guidance_scale"],
        true_cfg_scale=document.get("true_cfg_scale"),
        sigmas=sigmas,
        branches=branches,
        protected_steps=tuple(int(step) for step in document["protected_steps"]),
        threshold=defaults["threshold"],
        max_skip_steps=defaults["max_skip_steps"],
        retention_ratio=defaults["retention_ratio"],
        reuse=defaults["reuse"],
        budget=defaults["budget"],
        trials=tuple(_trial(entry, steps) for entry in document.get("trials", ())),
        provenance=document["provenance"],
    )
    profile.config()  # refuses defaults and protected steps that are out of range
    return profile


def _trial(entry: Sequence[Any], steps: int) -> Trial:
    schedule, reuse, error = entry
    if len(schedule) != steps or set(schedule) - {COMPUTE, REUSE} or reuse not in REUSE_MODES:
        raise ProfileError(f"a trial has schedule {schedule!r} and reuse {reuse!r}")
    return Trial(schedule, reuse, float(error))


def _branch(name: str, document: dict[str, Any], steps: int) -> BranchCurve:
    ratios = ratio_tuple(f"branches.{name}.norm_ratios", document["norm_ratios"])
    stds = tuple(float(value) for value in document["norm_stds"])
    cos = tuple(float(value) for value in document["cos_dises"])
    for field_name, values in (("norm_ratios", ratios), ("norm_stds", stds), ("cos_dises", cos)):
        if len(values) != steps and (values or field_name == "norm_ratios"):
            raise ProfileError(f"branches.{name}.{field_name} has {len(values)} values for {steps} steps")
    costs = document["costs"]
    return BranchCurve(ratios, stds, cos, None if costs is None else CostTable.from_document(costs, steps))


def write_profile(profile: Profile, path: Path) -> None:
    """Write ``profile`` to ``path``."""
    path.write_text(to_json(profile), encoding="utf-8")
