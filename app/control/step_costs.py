"""How long steps take: a running estimate by shape and batch size, computed and reused steps apart. Pure.

Each measured plan is a sum of parts, one per shape and kind. What of the total belongs to which part is decided as in
a Kalman filter with a diagonal covariance: parts that are known less well take more of the difference. A plan of one
part alone thus measures it directly, and mixed plans refine what they can.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from app.control.request import RowShape
from app.messages import StepPlan

UNKNOWN = 0.5
"""Relative standard deviation of an estimate that was scaled from another shape or batch size."""
NOISE = 0.1
"""Relative standard deviation of one measurement."""
DRIFT = 0.0004
"""Relative variance that an estimate gains per measurement: it follows a change within tens of plans."""
BELIEVED = 3.0
"""Standard deviations up to which a measurement is taken at its word: were one long pause of a rank believed, possible
deadlines would be refused, and then nothing would run that shows better."""


@dataclass(frozen=True)
class PlanPart:
    """Branch evaluations of one shape in one plan that all compute or all reuse."""

    shape: RowShape
    compute: bool
    rows: int

    @property
    def size(self) -> int:
        """Tokens that pass through."""
        return self.rows * self.shape.tokens


def parts_of(plan: StepPlan, shape_of: Callable[[str], RowShape]) -> tuple[PlanPart, ...]:
    """What ``plan`` consists of; ``shape_of`` gives the shape of a row by its id."""
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
        """Mean time that ranks wait for the control plane before a plan."""

    def seconds(self, part: PlanPart) -> float:
        """Estimated time of ``part``: measured, or scaled by tokens from the nearest that was."""
        known = self._known.get(part)
        return known.seconds if known is not None else self._scaled(part)

    def row_seconds(self, shape: RowShape, compute: bool, rows: float) -> float:
        """Estimated time of one branch evaluation in batches of ``rows`` on average, at least 1."""
        whole = int(rows)
        low, high = (self.seconds(PlanPart(shape, compute, count)) for count in (whole, whole + 1))
        return (low + (rows - whole) * (high - low)) / rows

    def plan_seconds(self, parts: tuple[PlanPart, ...]) -> float:
        """Estimated time of a plan."""
        return sum(self.seconds(part) for part in parts)

    def saved_seconds(self, parts: tuple[PlanPart, ...]) -> float:
        """Estimated time that the reusing parts of a plan would take longer if they computed."""
        reusing = [part for part in parts if not part.compute]
        return sum(max(self.seconds(replace(part, compute=True)) - self.seconds(part), 0.0) for part in reusing)

    def observe(self, parts: tuple[PlanPart, ...], seconds: float, idle_seconds: float = 0.0) -> Mapping[bool, float]:
        """Learn from one finished plan.

        Returns:
            ``seconds`` divided into what computed (True) and what reused (False).
        """
        self.gap_s += (idle_seconds - self.gap_s) / 16
        if not parts:
            return {True: 0.0, False: 0.0}
        estimates = [self._known.get(part) or self._guess(part) for part in parts]
        total = sum(estimate.seconds for estimate in estimates)
        variance = sum(estimate.variance for estimate in estimates) + (NOISE * total) ** 2
        limit = BELIEVED * math.sqrt(variance)
        surprise = min(max(seconds - total, -limit), limit)
        for part, estimate in zip(parts, estimates, strict=True):
            gain = estimate.variance / variance
            # A part may not vanish because another one in its plan was overestimated.
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
