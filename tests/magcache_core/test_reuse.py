"""What a reused step adds: weights by mode, for the rule's schedule and for a plan's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magcache_core import ConfigError, MagCacheConfig, Plan, decisions, load_profile, reuse_weights, schedule

FLUX = load_profile("flux.1-dev")
SCHEDULE = "CC..C...C."


def test_a_plan_becomes_decisions() -> None:
    made = Plan("CC..C.", "linear")
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.3, 0.1]
    found = decisions(made, sigmas)
    assert "".join("C" if d.compute else "." for d in found) == made.schedule
    assert found[2].weights == pytest.approx((2.0, -1.0))
    assert found[5].weights == pytest.approx((1.4, -0.4))
    assert decisions(made, sigmas, reuse="residual")[2].weights == (1.0,)


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


def test_decisions_carry_velocity_steps_and_no_residual_weights() -> None:
    sigmas = [1 - i / 10 for i in range(10)]
    decided = decisions(Plan(SCHEDULE, "corrected"), sigmas)
    assert decided == decisions(Plan(SCHEDULE), [*sigmas, 0.0], "corrected")
    for decision, mark in zip(decided, SCHEDULE, strict=True):
        assert decision.compute == (mark == "C")
        assert decision.weights == ()
        assert decision.velocity is not None
        assert bool(decision.velocity.move) == decision.compute
    with pytest.raises(ConfigError, match="sigmas"):
        decisions(Plan(SCHEDULE, "corrected"))
    with pytest.raises(ConfigError, match="reuses residuals"):
        reuse_weights("corrected", 0.5, [1.0, 0.8])
