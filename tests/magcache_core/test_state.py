"""The threshold rule: the published schedules, and an independent transcription of the rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magcache_core import (
    MagCacheConfig,
    MagCacheState,
    decisions,
    load_profile,
    predicted_error,
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
