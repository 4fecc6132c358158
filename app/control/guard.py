"""The quality guard: from images compared with uncached ones to how many steps compute. Pure.

At least nine of ten images are to reach a target PSNR. How many miss it is a binomial count, however the figures are
distributed. So a budget of computed steps rises when so many misses are unlikely where nine of ten reach the target,
and falls when so few are unlikely where nine of ten just reach the target and a margin. In between it stays. What was
measured at other budgets is kept: one that was found too low is not tried again until much more is known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from app.messages.jobs import ImageKind
from app.settings import QualityGuardSettings

SHARE_BELOW = 0.1
"""Share of the images that may be below the target: it is held by the 10th percentile."""
TOO_MANY_MISS = 0.05
"""Probability of so many misses, where nine of ten reach the target, up to which the budget rises: two of two."""
FEW_MISS = 0.1
"""Probability of so few misses, where nine of ten reach the margin, up to which it falls: none of 22 images."""
WINDOW = 100
"""Newest figures of each budget that count."""
RETRY = 300
"""Figures at one budget after which what was found of a lower one is forgotten, since requests change."""
ENOUGH_TO_ESTIMATE = 10
MOST_KINDS = 32
"""Kinds of images that are held at once; that which was measured longest ago is forgotten."""


@dataclass(frozen=True)
class Change:
    """A budget that was changed, and the figures that did it."""

    kind: ImageKind
    before: int
    after: int
    images: int
    worst_tenth_db: float | None


@dataclass
class _Held:
    """What is known of one kind of images: figures in dB by computed steps.

    Attributes:
        first: computed steps that it had before any change.
        since: figures at the budget since it was chosen.
    """

    first: int
    budget: int
    since: int = 0
    figures: dict[int, deque[float]] = field(default_factory=dict)

    def at(self, computed: int) -> deque[float]:
        return self.figures.setdefault(computed, deque(maxlen=WINDOW))


class QualityGuard:
    """Holds a target for each kind of images by its number of computed steps."""

    def __init__(self, settings: QualityGuardSettings, target_db: float) -> None:
        self._settings = settings
        self._target_db = target_db
        self._held: dict[ImageKind, _Held] = {}  # the one measured last at the end

    @property
    def budgets(self) -> tuple[tuple[ImageKind, int], ...]:
        """Computed steps by kind, where they are others than without a guard."""
        return tuple((kind, held.budget) for kind, held in self._held.items() if held.budget != held.first)

    def budget(self, kind: ImageKind) -> int:
        """Computed steps of a kind that was measured."""
        return self._held[kind].budget

    def observe(self, kind: ImageKind, computed: int, psnr_db: float) -> Change | None:
        """Take one image's figure, and say if that changes the budget of its kind."""
        held = self._held.pop(kind) if kind in self._held else _Held(computed, computed)
        self._held[kind] = held
        if len(self._held) > MOST_KINDS:
            del self._held[next(iter(self._held))]
        figures = held.at(computed)
        figures.append(psnr_db)
        if computed != held.budget:
            return None
        held.since += 1
        if held.since % RETRY == 0:
            held.figures.pop(computed - 1, None)
        margin_db = self._settings.margin_db
        after = decide(held.figures, computed, self._bounds(kind.steps), self._target_db, margin_db)
        if after == computed:
            return None
        held.budget, held.since = after, 0
        return Change(kind, computed, after, len(figures), worst_tenth(figures))

    def worst_tenth_db(self, kind: ImageKind) -> float | None:
        """The estimate for a kind at its present budget; None while too little is known."""
        held = self._held[kind]
        return worst_tenth(held.at(held.budget))

    def mean_db(self, kind: ImageKind, computed: int) -> float | None:
        """Mean figure of a kind at a number of computed steps; None while too little is known."""
        held = self._held.get(kind)
        figures = held.figures.get(computed, ()) if held is not None else ()
        return sum(figures) / len(figures) if len(figures) >= ENOUGH_TO_ESTIMATE else None

    def _bounds(self, steps: int) -> tuple[int, int]:
        low, high = self._settings.min_computed_share, self._settings.max_computed_share
        return math.ceil(low * steps - 1e-9), math.floor(high * steps + 1e-9)


def decide(
    figures: Mapping[int, Sequence[float]], budget: int, bounds: tuple[int, int], target_db: float, margin_db: float
) -> int:
    """The number of computed steps from now on: ``budget``, one more or one less.

    Args:
        figures: PSNR in dB by number of computed steps.
        bounds: the fewest and the most computed steps that it may choose.
    """
    low, high = bounds
    here, lower = figures[budget], figures.get(budget - 1, ())
    if budget < high and misses(here, target_db):
        return budget + 1
    if budget > low and exceeds(here, target_db + margin_db) and not misses(lower, target_db):
        return budget - 1
    return budget


def misses(figures: Sequence[float], target_db: float) -> bool:
    """Whether so many figures below ``target_db`` are unlikely where a tenth of all is."""
    below = sum(figure < target_db for figure in figures)
    return 1.0 - _at_most(below - 1, len(figures)) <= TOO_MANY_MISS


def exceeds(figures: Sequence[float], target_db: float) -> bool:
    """Whether so few figures below ``target_db`` are unlikely where a tenth of all is."""
    below = sum(figure < target_db for figure in figures)
    return _at_most(below, len(figures)) <= FEW_MISS


def worst_tenth(figures: Sequence[float]) -> float | None:
    """Median-unbiased estimate of the 10th percentile (Hyndman and Fan's type 8); None for fewer than ten figures."""
    if len(figures) < ENOUGH_TO_ESTIMATE:
        return None
    return float(np.quantile(figures, SHARE_BELOW, method="median_unbiased"))


@cache  # of the counts that a window has
def _at_most(count: int, trials: int) -> float:
    """Probability of at most ``count`` among ``trials`` that happen with `SHARE_BELOW` each."""
    return sum(math.comb(trials, i) * SHARE_BELOW**i * (1.0 - SHARE_BELOW) ** (trials - i) for i in range(count + 1))
