"""The metrics of all owners, as one process would have them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from app.control.counters import CoordinatorCounters
from app.metrics import ApiMetrics, CalibrationMetrics, CoordinatorMetrics, EncoderMetrics, GuardMetrics
from tests.metrics.owners import Everything


@pytest.fixture
def everything() -> Everything:
    registry = CollectorRegistry()
    return Everything(
        registry,
        ApiMetrics(registry, "m", "p"),
        CoordinatorMetrics(registry, "m", "r", CoordinatorCounters()),
        EncoderMetrics(registry, "m", "p"),
        GuardMetrics(registry, "m", "p", 38.0),
        CalibrationMetrics(registry, "m", "p"),
    )
