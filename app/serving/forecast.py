"""When a picture will be done: arithmetic over the request table, whose schedules are all known. Pure.

A tick is one step of every row under way. A row's place is free again after the steps that it still has, so it is known
after how many ticks a waiting picture joins; and what every row computes in between is known as well. Estimated are
only the time of a step (`app.serving.costs`), and that a free place is taken by a picture like the mean of those that
wait. Pictures that arrive later are not foreseen, nor steps that a row leaves to others in a full batch.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import islice

from app.serving.costs import StepCosts
from app.serving.entry import Entry, Shape
from app.serving.scheduler import StepScheduler
from app.serving.trajectory import Course

LOOKED_AT = 256
"""Waiting pictures that are looked at one by one; those behind them count as the mean of these."""


class Forecast:
    """What is ahead at one moment of one picture that runs or waits, or of nobody in particular.

    Attributes:
        wait_s: seconds until the picture joins the batch; 0 when it runs.
    """

    def __init__(
        self, scheduler: StepScheduler, costs: StepCosts, sent_s: float = 0.0, entry: Entry | None = None
    ) -> None:
        """``sent_s`` is the estimated time of the plans that were formed already and are not done."""
        self._costs = costs
        self._sent_s = sent_s
        self._entry = entry
        running = scheduler.running_entries
        self._running = [one for one in running if one is not entry]
        waits = entry is not None and entry.admitted_s is None
        others = [one for one in islice(scheduler.waiting_entries, LOOKED_AT) if one is not entry]
        steps = sum(one.remaining for one in others)
        self._mean_steps = steps / max(len(others), 1)
        self._refills = (scheduler.waiting - waits) * self._mean_steps  # ticks that those who wait will take
        tokens = entry.tokens if entry is not None else max((one.tokens for one in others), default=1)
        free = scheduler.free_places(tokens)
        self._places = [0] * free + sorted(one.remaining for one in running) or [0]
        # Those that share the steps' forward passes, which decides what one evaluation in them takes.
        self._together = self._running + others[:free] + ([entry] if entry is not None else [])
        self._rates = cache(self._row_rates)
        self._mean_step_s = sum(self._ahead_s(one, one.remaining) for one in others) / max(steps, 1)
        self._joins: float | None = None  # ticks until it does
        if entry is not None and waits:
            self._joins = self._joins_after(scheduler.position(entry))
        self.wait_s = self._elapsed_s(self._joins) if self._joins is not None else 0.0

    def total_s(self, course: Course | None = None) -> float:
        """Seconds from now to the picture's last step, with its own course or, while it waits, with another."""
        entry = self._entry
        assert entry is not None
        own = course or entry.course
        computed = own.computed[-1] - own.computed[entry.step]
        reused = entry.remaining * len(entry.trajectories) - computed
        computed_s, reused_s = self._rates(entry.shape)
        ticks = (self._joins or 0.0) + entry.remaining
        return self._elapsed_s(ticks) + computed * computed_s + reused * reused_s

    def place_s(self, position: int) -> float:
        """Seconds until the ``position``-th picture of the queue, from 1, joins the batch."""
        return self._elapsed_s(self._joins_after(position))

    def _joins_after(self, position: int) -> float:
        """Ticks until the ``position``-th picture of the queue joins."""
        rounds, place = divmod(position - 1, len(self._places))
        return self._places[place] + rounds * self._mean_steps

    def _elapsed_s(self, ticks: float) -> float:
        """Seconds that all others take for the next ``ticks`` ticks."""
        running = sum(self._ahead_s(one, min(int(ticks), one.remaining)) for one in self._running)
        refilled = sum(max(ticks - free_after, 0.0) for free_after in self._places)
        if self._joins is not None:
            refilled -= max(ticks - self._joins, 0.0)  # its own place is nobody else's
        waiting = min(max(refilled, 0.0), self._refills) * self._mean_step_s
        return self._sent_s + running + waiting + ticks * self._costs.gap_s

    def _ahead_s(self, entry: Entry, ticks: int) -> float:
        """Seconds that a row's next ``ticks`` steps take."""
        computed_s, reused_s = self._rates(entry.shape)
        computed = entry.course.computed[entry.step + ticks] - entry.course.computed[entry.step]
        return computed * computed_s + (ticks * len(entry.trajectories) - computed) * reused_s

    def _row_rates(self, shape: Shape) -> tuple[float, float]:
        """Seconds of one computed and of one reused step of one CFG branch."""
        rows = [(len(one.trajectories), one.course.share_computed) for one in self._together if one.shape == shape]
        computing = _mean_batch(rows)
        reusing = _mean_batch([(branches, 1 - share) for branches, share in rows])
        return self._costs.row_seconds(shape, True, computing), self._costs.row_seconds(shape, False, reusing)


def _mean_batch(rows: Sequence[tuple[int, float]]) -> float:
    """Mean size of those batches that are not empty, when each row is in it with its branches and probability."""
    mean = sum(branches * share for branches, share in rows)
    return max(mean / (1 - math.prod(1 - share for _, share in rows)), 1.0) if mean > 0 else 1.0
