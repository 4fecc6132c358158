"""When an image will be done: arithmetic over the request table, whose schedules are all known. Pure.

A round is one computed step of every running row, and the reused steps that each takes before it (see
`app.control.scheduler`). A row's place is free again after its remaining rounds, so the round in which a waiting image
joins is known, and so is what every row computes and reuses until then. Only two things are estimated: the time of a
step (`app.control.step_costs`), and that a free place goes to an image like the mean of the waiting ones. Later
arrivals are not foreseen, nor are steps deferred in a full batch.
"""

from functools import cache
from itertools import islice

from app.control.request import RequestState, RowShape
from app.control.schedule import RowSchedule
from app.control.scheduler import StepScheduler
from app.control.step_costs import StepCosts

SAMPLED_WAITING = 256
"""The first waiting images, which are counted one by one; the others count as the mean of these."""


class Forecast:
    """The work ahead of one running or waiting image, or of none in particular, at one moment.

    Attributes:
        wait_s: seconds until the image joins the batch; 0 when it runs.
    """

    def __init__(
        self, scheduler: StepScheduler, costs: StepCosts, sent_s: float = 0.0, entry: RequestState | None = None
    ) -> None:
        """``sent_s`` is the estimated time of the plans that are sent and not done."""
        self._costs = costs
        self._sent_s = sent_s
        self._entry = entry
        running = scheduler.running_entries
        self._running = [one for one in running if one is not entry]
        waits = entry is not None and entry.admitted_s is None
        others = [one for one in islice(scheduler.waiting_entries, SAMPLED_WAITING) if one is not entry]
        rounds = sum(one.rounds for one in others)
        self._mean_rounds = rounds / max(len(others), 1)
        self._refills = (scheduler.waiting - waits) * self._mean_rounds  # rounds of all waiting images
        tokens = entry.tokens if entry is not None else max((one.tokens for one in others), default=1)
        free = scheduler.free_places(tokens)
        self._places = [0] * free + sorted(one.rounds for one in running) or [0]
        # The rows that share forward passes, which decides the time of one evaluation.
        self._together = self._running + others[:free] + ([entry] if entry is not None else [])
        self._rates = cache(self._row_rates)
        self._mean_round_s = sum(self._ahead_s(one, one.rounds) for one in others) / max(rounds, 1)
        self._joins: float | None = None  # rounds until the image joins
        if entry is not None and waits:
            self._joins = self._joins_after(scheduler.position(entry))
        self.wait_s = self._elapsed_s(self._joins) if self._joins is not None else 0.0

    def total_s(self, row_schedule: RowSchedule | None = None) -> float:
        """Seconds from now to the image's last step, by its own schedule or, while it waits, by another."""
        entry = self._entry
        assert entry is not None
        own = row_schedule or entry.row_schedule
        computed = own.computed[-1] - own.computed[entry.step]
        reused = entry.remaining * len(entry.schedules) - computed
        computed_s, reused_s = self._rates(entry.shape)
        rounds = (self._joins or 0.0) + own.rounds[-1] - own.rounds[entry.step]
        return self._elapsed_s(rounds) + computed * computed_s + reused * reused_s

    def place_s(self, position: int) -> float:
        """Seconds until the ``position``-th image of the queue, from 1, joins the batch; images beyond it may come."""
        return self._elapsed_s(self._joins_after(position), max(self._refills, (position - 1) * self._mean_rounds))

    def _joins_after(self, position: int) -> float:
        """Rounds until the ``position``-th image of the queue joins."""
        turns, place = divmod(position - 1, len(self._places))
        return self._places[place] + turns * self._mean_rounds

    def _elapsed_s(self, rounds: float, refills: float | None = None) -> float:
        """Seconds that all other images take for the next ``rounds``; the waiting ones have ``refills`` of them."""
        running = sum(self._ahead_s(one, int(rounds)) for one in self._running)
        refilled = sum(max(rounds - free_after, 0.0) for free_after in self._places)
        if self._joins is not None:
            refilled -= max(rounds - self._joins, 0.0)  # the image itself takes one of the places
        waiting = min(max(refilled, 0.0), self._refills if refills is None else refills) * self._mean_round_s
        return self._sent_s + running + waiting + rounds * self._costs.gap_s

    def _ahead_s(self, entry: RequestState, rounds: int) -> float:
        """Seconds of a row's steps in the next ``rounds``, or of all its remaining ones."""
        computed_s, reused_s = self._rates(entry.shape)
        until = entry.row_schedule.step_after(entry.step, rounds)
        computed = entry.row_schedule.computed[until] - entry.row_schedule.computed[entry.step]
        return computed * computed_s + ((until - entry.step) * len(entry.schedules) - computed) * reused_s

    def _row_rates(self, shape: RowShape) -> tuple[float, float]:
        """Seconds of one computed and of one reused step of one CFG branch.

        All rows of a shape compute together; they also reuse together, each for the length of its run.
        """
        alike = [one for one in self._together if one.shape == shape]
        at_once = min(len(self._places) / len(self._together), 1.0)  # the share of them that has a place
        computing = at_once * sum(one.row_schedule.computed[-1] / one.row_schedule.rounds[-1] for one in alike)
        runs = [one.row_schedule.reused / one.row_schedule.rounds[-1] for one in alike]
        reusing = at_once * sum(runs) / max(runs) if any(runs) else 1.0
        rates = (True, max(computing, 1.0)), (False, max(reusing, 1.0))
        computed_s, reused_s = (self._costs.row_seconds(shape, compute, rows) for compute, rows in rates)
        return computed_s, reused_s
