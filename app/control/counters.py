"""A coordinator's totals as plain attributes; `app.metrics.coordinator` exports them."""

from dataclasses import dataclass, field


@dataclass
class CoordinatorCounters:
    """Totals since the group was built.

    Attributes:
        admitted, finished: images that joined the batch, and that took their last step.
        refused: images rejected because the queue was full.
        cancelled: images ended by a client, waiting or running.
        deadline_impossible, deadline_passed: images refused at arrival, and images ended when their deadline passed.
        lowered_by_deadline, lowered_by_load: admitted images with fewer computed steps than they asked for.
        computed_seconds, reused_seconds: time of the slowest rank on branch evaluations of either kind, estimated
            where a plan mixed them.
        saved_seconds: estimated time that the reused evaluations would have taken longer had they been computed.
        idle_seconds: time that the ranks waited for a plan while they held rows to step, the longest of each plan.
        rank_seconds: time that each rank worked on plans.
        calibration_runs: rows of calibrations that took their last step.
        calibration_seconds: time of the slowest rank on their plans, which no other total contains.
        messages, plans: what was sent; a message carries a run of plans.
    """

    admitted: int = 0
    finished: int = 0
    refused: int = 0
    cancelled: int = 0
    deadline_impossible: int = 0
    deadline_passed: int = 0
    lowered_by_deadline: int = 0
    lowered_by_load: int = 0
    computed_seconds: float = 0.0
    reused_seconds: float = 0.0
    saved_seconds: float = 0.0
    idle_seconds: float = 0.0
    rank_seconds: list[float] = field(default_factory=list)
    calibration_runs: int = 0
    calibration_seconds: float = 0.0
    messages: int = 0
    plans: int = 0
