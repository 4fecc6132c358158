"""The metric catalogue, its writers, and the merging of several sources into one exposition.

Each owner has its own registry; nothing is registered globally, so a test or a process may hold several.
"""

from app.metrics.api import ApiMetrics
from app.metrics.calibration import CalibrationMetrics
from app.metrics.catalogue import CATALOGUE, PHASES, Spec
from app.metrics.coordinator import CoordinatorMetrics
from app.metrics.encoder import EncoderMetrics
from app.metrics.guard import GuardMetrics
from app.metrics.merge import Families, merge_families

__all__ = [
    "CATALOGUE",
    "PHASES",
    "ApiMetrics",
    "CalibrationMetrics",
    "CoordinatorMetrics",
    "EncoderMetrics",
    "Families",
    "GuardMetrics",
    "Spec",
    "merge_families",
]
