"""Step times: a running estimate by shape and batch size, separately for computed and reused steps. Pure.

Each measured plan is a sum of parts, one per shape and kind. Its time is divided among them as in a Kalman filter with
a diagonal covariance: the less certain a part's estimate, the more of the difference it takes. So a plan of a single
part measures that part directly.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from app.control.request import RowShape
from app.messages.plans import StepPlan

UNKNOWN = 0.5
"""Relative standard deviation of an estimate that was scaled from another shape or batch size."""
NOISE = 0.1
"""Relative standard deviation of one measurement."""
DRIFT = 0.0004
"""Relative variance that an estimate gains per measurement: it follows a change within tens of plans."""
OUTLIER_SIGMA = 3.0
"""Measurements are clipped at this many standard deviations. Without it, one long pause of a rank would make feasible
deadlines look impossible, and no work would run to correct the estimate."""


@dataclass(frozen=True)
class PlanPart:
    """Branch evaluations of one shape in one plan that all compute or all reuse."""

    shape: RowShape
    compute: bool
    rows: int

    @property
    def size(self) -> int:
        """Tokens that go through the model."""
        return self.rows * self.shape.tokens


def parts_of(plan: StepPlan, shape_of: Callable[[str], RowShape]) -> tuple[PlanPart, ...]:
    """The parts of ``plan``; ``shape_of`` gives the shape of a row by its id."""
    counts = Counter(
        (shape, branch.compute) for row in plan.rows for shape in [shape_of(row.row_id)] for branch in row.branches
    )
    return tuple(PlanPart(shape, compute, rows) for (shape, compute), rows in counts.items())


@dataclass
class _Estimate:
    seconds: float
    variance: float


class StepCosts:
    """The running estimates of one group."""

    def __init__(self, measured: Mapping[PlanPart, float]) -> None:
        """``measured`` are seconds of at least one part that computes and one that reuses (`app.engine.warmup`)."""
        self._known = {part: _Estimate(seconds, (NOISE * seconds) ** 2) for part, seconds in measured.items()}
        self.gap_s = 0.0
        """Mean time that ranks wait for the coordinator before a plan."""

    def seconds(self, part: PlanPart) -> float:
        """Estimated time of ``part``, scaled by tokens from the nearest measured one if it was not measured itself."""
        known = self._known.get(part)
        return known.seconds if known is not None else self._scaled(part)

    def row_seconds(self, shape: RowShape, compute: bool, rows: float) -> float:
        """Estimated time of one branch evaluation in batches of ``rows`` (at least 1) on average."""
        whole = int(rows)
        low, high = (self.seconds(PlanPart(shape, compute, count)) for count in (whole, whole + 1))
        return (low + (rows - whole) * (high - low)) / rows

    def plan_seconds(self, parts: tuple[PlanPart, ...]) -> float:
        """Estimated time of a plan."""
        return sum(self.seconds(part) for part in parts)

    def saved_seconds(self, parts: tuple[PlanPart, ...]) -> float:
        """Estimated extra time of a plan if its reusing parts computed."""
        reusing = [part for part in parts if not part.compute]
        return sum(max(self.seconds(replace(part, compute=True)) - self.seconds(part), 0.0) for part in reusing)

    def observe(self, parts: tuple[PlanPart, ...], seconds: float, idle_seconds: float = 0.0) -> Mapping[bool, float]:
        """Update the estimates from one finished plan.

        Returns:
            ``seconds`` divided into computed (True) and reused (False) evaluations.
        """
        self.gap_s += (idle_seconds - self.gap_s) / 16
        if not parts:
            return {True: 0.0, False: 0.0}
        estimates = [self._known.get(part) or self._guess(part) for part in parts]
        total = sum(estimate.seconds for estimate in estimates)
        variance = sum(estimate.variance for estimate in estimates) + (NOISE * total) ** 2
        limit = OUTLIER_SIGMA * math.sqrt(variance)
        surprise = min(max(seconds - total, -limit), limit)
        for part, estimate in zip(parts, estimates, strict=True):
            gain = estimate.variance / variance
            # An overestimated part must not drive another one of its plan towards 0.
            estimate.seconds = max(estimate.seconds + gain * surprise, estimate.seconds / 4)
            estimate.variance = (1 - gain) * estimate.variance + DRIFT * estimate.seconds**2
            self._known[part] = estimate
        scale = seconds / sum(estimate.seconds for estimate in estimates)
        split = {True: 0.0, False: 0.0}
        for part, estimate in zip(parts, estimates, strict=True):
            split[part.compute] += scale * estimate.seconds
        return split

    def _guess(self, part: PlanPart) -> _Estimate:
        guess = self._scaled(part)
        return _Estimate(guess, (UNKNOWN * guess) ** 2)

    def _scaled(self, part: PlanPart) -> float:
        candidates = [known for known in self._known if known.compute == part.compute]
        nearest = min(candidates, key=lambda other: (other.shape != part.shape, abs(math.log(other.size / part.size))))
        return self._known[nearest].seconds * part.size / nearest.size
