"""The threshold rule: the published schedules, and an independent transcription of the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magcache_core import (
    ConfigError,
    MagCacheConfig,
    MagCacheState,
    decisions,
    load_profile,
    predicted_error,
    reuse_weights,
    schedule,
)

FLUX = load_profile("flux.1-dev")
OMNI = load_profile("flux.1-dev-vllm-omni")


@pytest.mark.parametrize(
    ("steps", "changes", "expected"),
    [
        (28, {}, "CCC..C...C.C.....C.....C..C."),
        (50, {}, "CCCCC.C..C...C...C..C.....C.....C.....C.....C..C.."),
        (28, {"protected_steps": ()}, "CCC..C...C.....C.....C....C."),
        (50, {"protected_steps": ()}, "CCCCC.C..C...C...C.....C.....C.....C.....C...C..C."),
        (
            28,
            {"protected_steps": (), "mag_threshold": 0.06, "mag_max_skip_steps": 3, "mag_retention_ratio": 0.2},
            "CCCCCC.C.C...C...C...C..C.CC",
        ),
    ],
)
def test_published_schedules_of_flux_dev(steps: int, changes: dict[str, object], expected: str) -> None:
    assert schedule(FLUX.config(steps, **changes)) == expected


def test_published_schedule_of_vllm_omnis_curve() -> None:
    assert schedule(OMNI.config()) == "CCC..C...C....C.....C.....C."


def transcription(config: MagCacheConfig) -> str:
    """The rule of the design once more, straight down, on its own resampling."""
    n, ratios = config.num_inference_steps, list(config.mag_ratios)
    source = [len(ratios) - 1] if n == 1 else [round(i * (len(ratios) - 1) / (n - 1)) for i in range(n)]
    retention = int(config.retention_ratio * n + 0.5)
    a, s, e, residual, marks = 1.0, 0, 0.0, False, ""
    for i in range(n):
        reuse = False
        if i >= retention:
            a *= ratios[source[i]]
            s += 1
            e += abs(1 - a)
            if residual and e <= config.threshold and s <= config.max_skip_steps:
                reuse = source[i] not in config.protected_steps
        if i >= retention and not reuse:
            a, s, e = 1.0, 0, 0.0
        residual = residual or not reuse
        marks += "." if reuse else "C"
    return marks


@pytest.mark.parametrize("steps", [1, 4, 8, 20, 28, 50, 100])
@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-kontext-dev", "flux.1-dev-vllm-omni"])
def test_step_counts_against_the_transcription(name: str, steps: int) -> None:
    config = load_profile(name).config(steps)
    assert schedule(config) == transcription(config)


configs = st.builds(
    MagCacheConfig,
    threshold=st.floats(0, 2),
    max_skip_steps=st.integers(0, 8),
    retention_ratio=st.floats(0, 1),
    num_inference_steps=st.integers(1, 60),
    mag_ratios=st.lists(st.floats(0.5, 1.5), min_size=28, max_size=28),
    protected_steps=st.sets(st.integers(0, 27), max_size=4),
)


@given(configs)
def test_any_settings_against_the_transcription(config: MagCacheConfig) -> None:
    assert schedule(config) == transcription(config)


@given(configs)
def test_properties_of_a_schedule(config: MagCacheConfig) -> None:
    marks = schedule(config)
    assert len(marks) == config.num_inference_steps
    assert marks.startswith("C" * max(config.retained_steps, 1))
    assert all(marks[step] == "C" for step in config.protected)
    assert "." * (config.max_skip_steps + 1) not in marks
    assert schedule(config) == marks
    assert predicted_error(config) >= 0
    assert (predicted_error(config) == 0) or "." in marks


@given(configs)
def test_decisions_equal_the_state_machine(config: MagCacheConfig) -> None:
    state = MagCacheState(config)
    one_by_one = [state.step() for _ in range(config.num_inference_steps)]
    assert list(decisions(config)) == one_by_one
    with pytest.raises(IndexError, match="reset"):
        state.step()
    state.reset()
    assert state.step() == one_by_one[0]


def test_a_step_that_must_compute_starts_a_new_segment() -> None:
    state = MagCacheState(MagCacheConfig(9, 9, 0.0, 4, [1.1] * 4))
    marks = [state.step(must_compute=i == 2) for i in range(4)]
    assert [decision.compute for decision in marks] == [True, False, True, False]
    assert marks[3].accumulated_error == pytest.approx(0.1)


def test_accumulated_error_and_predicted_error() -> None:
    config = MagCacheConfig(0.5, 5, 0.0, 4, [1.0, 1.1, 1.1, 2.0])
    assert schedule(config) == "C..C"
    errors = [decision.accumulated_error for decision in decisions(config)]
    assert errors == pytest.approx([0, 0.1, 0.31, 0])
    assert predicted_error(config) == pytest.approx(0.1 + 0.21)


def test_weights_of_the_reuse_modes() -> None:
    config = MagCacheConfig(9, 2, 0.0, 6, [1.0, 1.1, 1.1, 1.0, 1.2, 1.2])
    assert schedule(config) == "C..C.."
    sigmas = [1.0, 0.9, 0.8, 0.6, 0.5, 0.2]
    weights = {mode: [d.weights for d in decisions(config, sigmas, mode)] for mode in ("residual", "scaled", "linear")}
    assert weights["residual"] == [(), (1.0,), (1.0,), (), (1.0,), (1.0,)]
    assert [w[0] for w in weights["scaled"] if w] == pytest.approx([1.1, 1.21, 1.2, 1.44])
    # One computed residual so far: nothing to extrapolate from.
    assert weights["linear"][:3] == [(), (1.0,), (1.0,)]
    assert weights["linear"][4] == pytest.approx((1.25, -0.25))
    assert weights["linear"][5] == pytest.approx((2.0, -1.0))


@given(st.floats(0.01, 0.3), st.floats(-2, 2))
def test_linear_reuse_is_exact_on_lines(at: float, slope: float) -> None:
    computed = [0.4, 0.7, 0.9]
    weights = reuse_weights("linear", at, computed)
    assert sum(weights) == pytest.approx(1)
    total = sum(w * (1 + slope * s) for w, s in zip(weights, computed, strict=False))
    assert total == pytest.approx(1 + slope * at)


def test_missing_sigmas_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="sigmas"):
        decisions(FLUX.config(), reuse="linear")
    with pytest.raises(ConfigError, match="one per step"):
        decisions(FLUX.config(), [1.0, 0.5], reuse="linear")
    with pytest.raises(ConfigError, match="one of residual"):
        decisions(FLUX.config(), reuse="cubic")


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
