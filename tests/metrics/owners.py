"""The owners' metrics in registries of their own, and plans to count."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from app.control.counters import CoordinatorCounters
from app.messages.jobs import COND, UNCOND
from app.messages.plans import BranchStep, RowStep, StepPlan
from app.metrics import ApiMetrics, CalibrationMetrics, CoordinatorMetrics, EncoderMetrics, GuardMetrics


def coordinator_metrics(
    replica: str = "r", counters: CoordinatorCounters | None = None
) -> tuple[CollectorRegistry, CoordinatorMetrics]:
    registry = CollectorRegistry()
    return registry, CoordinatorMetrics(registry, "m", replica, counters or CoordinatorCounters())


def plan_of(*rows: tuple[bool, ...]) -> StepPlan:
    """One row per tuple: whether its conditional, and then its unconditional branch computes."""
    steps = tuple(
        RowStep(
            f"q/{index}",
            3,
            tuple(BranchStep(branch, compute) for branch, compute in zip((COND, UNCOND), row, strict=False)),
        )
        for index, row in enumerate(rows)
    )
    return StepPlan(1, "0" * 16, rows=steps)


@dataclass(frozen=True)
class Everything:
    """The metrics of all owners in one registry."""

    registry: CollectorRegistry
    api: ApiMetrics
    coordinator: CoordinatorMetrics
    encoder: EncoderMetrics
    guard: GuardMetrics
    calibration: CalibrationMetrics
