"""What a coordinator counts."""

from __future__ import annotations

import pytest

from app.control.counters import CoordinatorCounters
from app.messages.jobs import COND, UNCOND
from app.messages.plans import StepPlan
from app.messages.results import DenoiseReport
from app.metrics.catalogue import BRANCHES
from tests.metrics.owners import coordinator_metrics, plan_of

LABELS = {"model": "m", "replica": "r"}


def test_steps_by_decision_and_branch() -> None:
    registry, metrics = coordinator_metrics()
    metrics.observe_step(plan_of((True,), (False,), (True, False)), [0.01, 0.02], wait_seconds=0.25, tokens=192)
    metrics.observe_step(plan_of((False,)), [0.001, 0.001])
    metrics.observe_step(StepPlan(2, "0" * 16, drop=("q/0",)), [0.001, 0.001])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {**LABELS, **labels})

    assert BRANCHES == (COND, UNCOND)
    assert value("flux_steps_total", decision="computed", branch=COND) == 2
    assert value("flux_steps_total", decision="reused", branch=COND) == 2
    assert value("flux_steps_total", decision="computed", branch=UNCOND) == 0
    assert value("flux_steps_total", decision="reused", branch=UNCOND) == 1
    assert (value("flux_step_batch_rows_sum"), value("flux_step_batch_rows_count")) == (2, 1)
    assert (value("flux_step_batch_tokens_sum"), value("flux_step_batch_tokens_count")) == (192, 1)
    assert (value("flux_plan_wait_seconds_sum"), value("flux_plan_wait_seconds_count")) == (0.25, 2)
    for kind, seconds in (("computed", 0.02), ("reused", 0.001)):
        assert value("flux_step_duration_seconds_sum", kind=kind) == seconds
    assert value("flux_rank_step_duration_seconds_sum", kind="computed", rank="0") == 0.01
    assert value("flux_rank_step_duration_seconds_sum", kind="computed", rank="1") == 0.02
    assert value("flux_straggler_gap_seconds_sum", kind="computed") == pytest.approx(0.01)
    assert value("flux_straggler_gap_seconds_sum", kind="reused") == 0
    assert value("flux_digests_checked_total") == 6


def test_a_finished_image() -> None:
    registry, metrics = coordinator_metrics()
    metrics.observe_request(DenoiseReport("CC..C...", 3, 5, 0.4, None, 0.0, 0.1), "q")
    assert registry.get_sample_value("flux_request_skip_ratio_sum", LABELS) == 0.625
    assert registry.get_sample_value("flux_request_predicted_error_sum", LABELS) == 0.4

    def steps(decision: str) -> list[float | None]:
        return [
            registry.get_sample_value(
                "flux_schedule_steps_total", {**LABELS, "decile": str(decile), "decision": decision}
            )
            for decile in range(10)
        ]

    # Eight steps fall into eight of the ten parts.
    assert steps("computed") == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert steps("reused") == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]


def test_gauges_and_counts() -> None:
    registry, metrics = coordinator_metrics()
    metrics.running(3)
    metrics.waiting(2)
    metrics.waiting_limit(256)
    metrics.residual_bytes(4096)
    metrics.group_rebuilt()
    metrics.digest_mismatch()
    for name, value in (
        ("flux_running_pictures", 3), ("flux_waiting_pictures", 2), ("flux_waiting_pictures_limit", 256),
        ("flux_residual_bytes", 4096), ("flux_group_rebuilds_total", 1), ("flux_digest_mismatches_total", 1),
        ("flux_group_up", 1),
    ):  # fmt: skip
        assert registry.get_sample_value(name, LABELS) == value
    metrics.group_up(False)
    assert registry.get_sample_value("flux_group_up", LABELS) == 0


def test_a_coordinators_own_sums_become_counters() -> None:
    counts = CoordinatorCounters(
        admitted=1, finished=2, refused=3, cancelled=4, deadline_impossible=5, deadline_passed=6,
        lowered_by_deadline=7, lowered_by_load=8, computed_seconds=0.5, reused_seconds=0.25, saved_seconds=0.125,
        calibration_runs=9, calibration_seconds=0.75,
    )  # fmt: skip
    registry, _ = coordinator_metrics(counters=counts)
    counts.admitted, counts.saved_seconds = 11, 0.5
    expected: list[tuple[str, dict[str, str], float]] = [
        ("flux_pictures_admitted_total", {}, 11),
        ("flux_pictures_finished_total", {}, 2),
        ("flux_pictures_refused_total", {"reason": "queue_full"}, 3),
        ("flux_pictures_cancelled_total", {}, 4),
        ("flux_pictures_refused_total", {"reason": "deadline_impossible"}, 5),
        ("flux_deadline_misses_total", {}, 6),
        ("flux_downgrades_total", {"reason": "deadline"}, 7),
        ("flux_downgrades_total", {"reason": "load"}, 8),
        ("flux_decision_seconds_total", {"decision": "computed"}, 0.5),
        ("flux_decision_seconds_total", {"decision": "reused"}, 0.25),
        ("flux_saved_seconds_total", {}, 0.5),
        ("flux_calibration_runs_total", {}, 9),
        ("flux_calibration_seconds_total", {}, 0.75),
    ]
    for name, labels, value in expected:
        assert registry.get_sample_value(name, LABELS | labels) == value, name


def test_the_attention_backend() -> None:
    registry, metrics = coordinator_metrics()
    metrics.attention("cudnn")
    assert registry.get_sample_value("flux_attention_info", {**LABELS, "backend": "cudnn"}) == 1
    assert registry.get_sample_value("flux_attention_info", {**LABELS, "backend": "flash"}) is None
