"""How long steps take: a running estimate by shape and batch size, computed and reused steps apart. Pure.

Each measured plan is a sum of parts, one per shape and kind. What of the total belongs to which part is decided as in
a Kalman filter with a diagonal covariance: parts that are known less well take more of the difference. A plan of one
part alone thus measures it directly, and mixed plans refine what they can.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from app.engine.messages import StepPlan
from app.serving.entry import Shape

UNKNOWN = 0.5
"""Relative standard deviation of an estimate that was scaled from another shape or batch size."""
NOISE = 0.1
"""Relative standard deviation of one measurement."""
DRIFT = 0.0004
"""Relative variance that an estimate gains per measurement: it follows a change within some ten plans."""
REUSED_SHARE = 0.1
"""A reused step's time relative to a computed one, until one was measured."""


@dataclass(frozen=True)
class Part:
    """Branch evaluations of one shape in one plan that all compute or all reuse."""

    shape: Shape
    compute: bool
    rows: int

    @property
    def size(self) -> int:
        """Tokens that pass through."""
        return self.rows * self.shape.tokens


def parts_of(plan: StepPlan, shape_of: Callable[[str], Shape]) -> tuple[Part, ...]:
    """What ``plan`` consists of; ``shape_of`` gives the shape of a row by its id."""
    counts = Counter(
        (shape, branch.compute) for row in plan.rows for shape in [shape_of(row.row_id)] for branch in row.branches
    )
    return tuple(Part(shape, compute, rows) for (shape, compute), rows in counts.items())


@dataclass
class _Estimate:
    seconds: float
    variance: float


class StepCosts:
    """The running estimates of one group.

    Before the first plan nothing is known, and everything is estimated at 0 seconds: the first picture calibrates, and
    no deadline is refused on a guess.
    """

    def __init__(self) -> None:
        self._known: dict[Part, _Estimate] = {}
        self.gap_s = 0.0
        """Mean time that ranks wait for the control plane before a plan."""

    @property
    def calibrated(self) -> bool:
        """Whether anything was measured."""
        return bool(self._known)

    def seconds(self, part: Part) -> float:
        """Estimated time of ``part``: measured, or scaled by tokens from the nearest that was."""
        known = self._known.get(part)
        return known.seconds if known is not None else self._scaled(part)

    def row_seconds(self, shape: Shape, compute: bool, rows: float) -> float:
        """Estimated time of one branch evaluation in batches of ``rows`` on average, at least 1."""
        whole = int(rows)
        low, high = (self.seconds(Part(shape, compute, count)) for count in (whole, whole + 1))
        return (low + (rows - whole) * (high - low)) / rows

    def plan_seconds(self, parts: tuple[Part, ...]) -> float:
        """Estimated time of a plan."""
        return sum(self.seconds(part) for part in parts)

    def saved_seconds(self, parts: tuple[Part, ...]) -> float:
        """Estimated time that the reusing parts of a plan would take longer if they computed."""
        reusing = [part for part in parts if not part.compute]
        return sum(max(self.seconds(replace(part, compute=True)) - self.seconds(part), 0.0) for part in reusing)

    def observe(self, parts: tuple[Part, ...], seconds: float, idle_seconds: float = 0.0) -> Mapping[bool, float]:
        """Learn from one finished plan.

        Returns:
            ``seconds`` divided into what computed (True) and what reused (False).
        """
        self.gap_s += (idle_seconds - self.gap_s) / 16
        if not parts:
            return {True: 0.0, False: 0.0}
        estimates = [self._known.get(part) or self._guess(part, seconds, parts) for part in parts]
        total = sum(estimate.seconds for estimate in estimates)
        variance = sum(estimate.variance for estimate in estimates) + (NOISE * total) ** 2
        for part, estimate in zip(parts, estimates, strict=True):
            gain = estimate.variance / variance
            # A part may not vanish because another one in its plan was overestimated.
            estimate.seconds = max(estimate.seconds + gain * (seconds - total), estimate.seconds / 4)
            estimate.variance = (1 - gain) * estimate.variance + DRIFT * estimate.seconds**2
            self._known[part] = estimate
        scale = seconds / sum(estimate.seconds for estimate in estimates)
        split = {True: 0.0, False: 0.0}
        for part, estimate in zip(parts, estimates, strict=True):
            split[part.compute] += scale * estimate.seconds
        return split

    def _guess(self, part: Part, seconds: float, parts: tuple[Part, ...]) -> _Estimate:
        if self.calibrated:
            guess = self._scaled(part)
        else:
            weights = {other: other.size * (1.0 if other.compute else REUSED_SHARE) for other in parts}
            guess = seconds * weights[part] / sum(weights.values())
        return _Estimate(guess, (UNKNOWN * guess) ** 2)

    def _scaled(self, part: Part) -> float:
        same_kind = [known for known in self._known if known.compute == part.compute]
        candidates = same_kind or list(self._known)
        if not candidates:
            return 0.0
        nearest = min(candidates, key=lambda other: (other.shape != part.shape, abs(math.log(other.size / part.size))))
        kind = 1.0 if same_kind else (1 / REUSED_SHARE if part.compute else REUSED_SHARE)
        return kind * self._known[nearest].seconds * part.size / nearest.size
