"""Settings of the rule: what is taken, and how a wrong value is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magcache_core import ConfigError, MagCacheConfig, load_profile

FLUX = load_profile("flux.1-dev")


@pytest.mark.parametrize(
    "ratios", [[1.0, 1.1, 0.9], (1.0, 1.1, 0.9), np.array([1.0, 1.1, 0.9]), torch.tensor([1.0, 1.1, 0.9])]
)
def test_ratios_of_any_kind(ratios: object) -> None:
    config = MagCacheConfig(mag_ratios=ratios)  # type: ignore[arg-type]
    assert config.mag_ratios == pytest.approx((1.0, 1.1, 0.9))
    assert len(config.ratios) == 28


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("threshold", -0.1, ">= 0"),
        ("threshold", float("nan"), ">= 0"),
        ("threshold", float("inf"), "finite"),
        ("threshold", "0.2", "number"),
        ("max_skip_steps", -1, "integer >= 0"),
        ("max_skip_steps", 2.5, "integer >= 0"),
        ("max_skip_steps", True, "integer >= 0"),
        ("retention_ratio", 1.5, "from 0 to 1"),
        ("num_inference_steps", 0, "integer >= 1"),
        ("protected_steps", (28,), "0 to 27"),
        ("mag_ratios", [1.0, 0.0], "> 0"),
        ("mag_ratios", [float("nan")], "> 0"),
    ],
)
def test_values_out_of_range_name_field_value_and_range(field: str, value: object, allowed: str) -> None:
    settings: dict[str, object] = {"mag_ratios": FLUX.ratios, field: value}
    with pytest.raises(ConfigError) as error:
        MagCacheConfig(**settings)  # type: ignore[arg-type]
    assert field in str(error.value)
    assert allowed in str(error.value)
    shown = value[-1] if isinstance(value, tuple | list) else value
    assert repr(shown) in str(error.value)


def test_aliases() -> None:
    config = MagCacheConfig(mag_ratios=[1.0], mag_threshold=0.1, mag_max_skip_steps=2, mag_retention_ratio=0.3)
    assert (config.threshold, config.max_skip_steps, config.retention_ratio) == (0.1, 2, 0.3)
    assert (config.mag_threshold, config.mag_max_skip_steps, config.mag_retention_ratio) == (0.1, 2, 0.3)
    with pytest.raises(TypeError, match="mag_treshold"):
        MagCacheConfig(mag_ratios=[1.0], mag_treshold=0.1)
