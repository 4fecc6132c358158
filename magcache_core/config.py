"""Settings of the MagCache rule: plain, validated, immutable data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from magcache_core.resample import nearest_index

ALIASES = {
    "mag_threshold": "threshold",
    "mag_max_skip_steps": "max_skip_steps",
    "mag_retention_ratio": "retention_ratio",
}
"""The service's request fields and the `MagCacheConfig` fields that they stand for."""


class ConfigError(ValueError):
    """A setting is out of range; the message names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not allowed: {field} must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their message alone; this one crosses processes with its fields.
        return ConfigError, (self.field, self.value, self.allowed)


@dataclass(frozen=True, init=False)
class MagCacheConfig:
    """One request's MagCache settings (Ma et al., arXiv 2506.09045).

    Attributes:
        threshold: largest accumulated error of a run of reused steps, >= 0 (no unit: a sum of relative magnitudes).
        max_skip_steps: most steps in a row that may reuse (the paper's K), >= 0; 0 computes every step.
        retention_ratio: fraction of the first steps that always compute, in [0, 1].
        num_inference_steps: denoising steps of the request, >= 1.
        mag_ratios: the calibrated curve, one ratio of residual norms per step of the run that measured it. It may have
            another length than ``num_inference_steps``; `ratios` is the curve resampled to the request's steps. When
            left out, it is that of the strategy of the transformer that `apply_mag_cache` gets.
        calibrate: compute every step and measure the curve; ``mag_ratios`` may then be left out.
        protected_steps: steps that always compute, **as indices into** ``mag_ratios``. A request's step i is protected
            when the resampling rule maps it to one of them, as in the authors' FLUX script (11 of 28).
    """

    threshold: float
    max_skip_steps: int
    retention_ratio: float
    num_inference_steps: int
    mag_ratios: tuple[float, ...]
    calibrate: bool
    protected_steps: tuple[int, ...]

    def __init__(
        self,
        threshold: float = 0.24,
        max_skip_steps: int = 5,
        retention_ratio: float = 0.1,
        num_inference_steps: int = 28,
        mag_ratios: Iterable[Any] | None = None,
        calibrate: bool = False,
        protected_steps: Iterable[int] = (),
        **aliases: Any,
    ) -> None:
        """Validate and store; see the class for the fields.

        Args:
            mag_ratios: a list, a tuple, a numpy array or a one-dimensional tensor.
            aliases: ``mag_threshold``, ``mag_max_skip_steps``, ``mag_retention_ratio``; one that is given wins.

        Raises:
            ConfigError: a value is out of range.
            TypeError: an unknown keyword.
        """
        values: dict[str, Any] = {
            "threshold": threshold,
            "max_skip_steps": max_skip_steps,
            "retention_ratio": retention_ratio,
        }
        for alias, value in aliases.items():
            if alias not in ALIASES:
                raise TypeError(f"MagCacheConfig got an unknown field {alias!r}; its aliases are {', '.join(ALIASES)}")
            values[ALIASES[alias]] = value
        ratios = ratio_tuple("mag_ratios", mag_ratios if mag_ratios is not None else ())
        set_field = object.__setattr__
        set_field(self, "threshold", _number("threshold", values["threshold"], 0.0, math.inf))
        set_field(self, "max_skip_steps", _integer("max_skip_steps", values["max_skip_steps"], 0))
        set_field(self, "retention_ratio", _number("retention_ratio", values["retention_ratio"], 0.0, 1.0))
        set_field(self, "num_inference_steps", _integer("num_inference_steps", num_inference_steps, 1))
        set_field(self, "mag_ratios", ratios)
        set_field(self, "calibrate", bool(calibrate))
        set_field(self, "protected_steps", _protected(protected_steps, len(ratios)))

    @property
    def mag_threshold(self) -> float:
        """The service's name for `threshold`."""
        return self.threshold

    @property
    def mag_max_skip_steps(self) -> int:
        """The service's name for `max_skip_steps`."""
        return self.max_skip_steps

    @property
    def mag_retention_ratio(self) -> float:
        """The service's name for `retention_ratio`."""
        return self.retention_ratio

    @property
    def ratios(self) -> tuple[float, ...]:
        """The curve at the request's steps, ``num_inference_steps`` values (nearest index)."""
        steps = self.num_inference_steps
        if not self.mag_ratios:
            return (1.0,) * steps
        return tuple(self.mag_ratios[nearest_index(i, steps, len(self.mag_ratios))] for i in range(steps))

    @property
    def protected(self) -> frozenset[int]:
        """The request's own step indices that always compute because of `protected_steps`."""
        steps, length = self.num_inference_steps, len(self.mag_ratios)
        if not self.protected_steps:
            return frozenset()
        return frozenset(i for i in range(steps) if nearest_index(i, steps, length) in self.protected_steps)

    @property
    def retained_steps(self) -> int:
        """How many steps at the start always compute: ``int(retention_ratio * num_inference_steps + 0.5)``."""
        return int(self.retention_ratio * self.num_inference_steps + 0.5)

    def resampled(self, num_inference_steps: int) -> MagCacheConfig:
        """The same settings for another step count."""
        return replace(self, num_inference_steps=num_inference_steps)


def ratio_tuple(field: str, values: Any) -> tuple[float, ...]:
    """Turn a list, numpy array or tensor of positive ratios into a tuple of floats; `ConfigError` names a bad one."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0.0 < value < math.inf):
            raise ConfigError(f"{field}[{index}]", value, "a finite number > 0")
    return tuple(float(value) for value in values)


def _number(field: str, value: Any, low: float, high: float) -> float:
    allowed = f"a finite number >= {low:g}" if math.isinf(high) else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value) or not low <= value <= high:
        raise ConfigError(field, value, allowed)
    return float(value)


def _integer(field: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(field, value, f"an integer >= {low}")
    return value


def _protected(steps: Iterable[int], length: int) -> tuple[int, ...]:
    result = tuple(sorted(set(steps)))
    for step in result:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < length:
            raise ConfigError("protected_steps", step, f"indices into mag_ratios, 0 to {length - 1}")
    return result
