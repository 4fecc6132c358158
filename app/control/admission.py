"""Admission control: the bounded queue, deadlines, quality under load, estimates. Pure.

An image's schedule is chosen twice by the same arithmetic: at its arrival, with the estimated wait, which decides
whether its deadline can be met; and at its admission, with the time that is left, which is the schedule that runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from app.control.counters import CoordinatorCounters
from app.control.forecast import Forecast
from app.control.key_limits import KeyLimits
from app.control.promises import Promises
from app.control.quality import Choice, ScheduleSelector
from app.control.request import RequestState, RowShape
from app.control.schedule import BranchSchedule, SchedulePlanner, make_row_schedule
from app.control.scheduler import StepScheduler
from app.control.step_costs import PlanPart, StepCosts, parts_of
from app.errors import BusyError, DeadlineImpossibleError, InvalidRequestError
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.plans import StepPlan
from app.messages.results import StepResult, StepTime
from app.settings import Settings


@dataclass(frozen=True)
class SentPlan:
    """A plan sent to the ranks, its parts by cost, and its estimated time; neither for one in the background."""

    plan: StepPlan
    parts: tuple[PlanPart, ...]
    seconds: float


class AdmissionController:
    """The request table and the step-time estimates; admits, rejects and schedules images by them."""

    def __init__(
        self,
        settings: Settings,
        planner: SchedulePlanner,
        measured_times: Sequence[StepTime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``measured_times`` are the times of images like `default_job`."""
        self.scheduler = StepScheduler(settings, clock, self._fix_schedule)
        shape = RowShape.of(default_job(settings), settings)
        self.costs = StepCosts({PlanPart(shape, one.compute, one.rows): one.seconds for one in measured_times})
        self.counts = CoordinatorCounters()
        self._settings = settings
        self._planner = planner
        self._key_limits = KeyLimits(settings.keys, clock)
        self._selector = ScheduleSelector(settings.magcache, planner)
        self._clock = clock
        self._sent_s = 0.0
        self._promises = Promises(clock)

    def submit(self, job: DenoiseJob) -> RequestState:
        """Queue an image.

        Raises:
            BusyError: the queue is full, or the limits of the API key are reached.
            DeadlineImpossibleError: no schedule that client and server allow is estimated to meet the deadline.
            InvalidRequestError: one step of it does not fit into a batch.
            magcache_core.ConfigError: ``computed_steps`` cannot be met with the other settings.
        """
        if job.calibration is not None:
            self._tokens(job)
            return self.scheduler.submit(job, self._planner.schedules(job))
        entry = self._queue(job)
        self._promises.take(job.retry_key)
        self._key_limits.take(entry)
        return entry

    def check(self, job: DenoiseJob) -> None:
        """Raise what `submit` would raise, and count a refusal as it would; an image that would be taken is not."""
        self.scheduler.cancel(self._queue(job).job.row_id)

    def _queue(self, job: DenoiseJob) -> RequestState:
        free = self.scheduler.free_places(self._tokens(job))
        if not self._has_place(job, free):
            self.counts.refused += 1
            # Each refused client gets a later place in Retry-After, which spreads their retries.
            wait_s = self._forecast().place_s(1 + round(self._promises.expected))
            self._promises.make(job.retry_key, wait_s)
            raise BusyError(wait_s)
        try:
            waiting = len(self.scheduler.waiting_of(job.key_name))
            self._key_limits.check(job, waiting, free, lambda: self._forecast().place_s(1))
        except BusyError:
            self.counts.refused += 1
            raise
        entry = self.scheduler.submit(job, self._planner.schedules(job))
        entry.selector = self._selector
        position = self.scheduler.position(entry)
        at_once = position <= self.scheduler.free_places(entry.tokens)
        forecast = self._forecast(entry)
        choice = self._choose(entry, forecast, forecast.wait_s)
        entry.set_schedule(choice.schedules, choice.lowered_by)
        entry.eta_s = forecast.total_s()
        entry.position = 0 if at_once else position
        if not choice.meets_deadline:
            self.scheduler.cancel(job.row_id)
            self.counts.deadline_impossible += 1
            raise DeadlineImpossibleError(
                f"deadline_s is {job.deadline_s:g}, and with the fewest computed steps that client and server allow "
                f"the image needs about {entry.eta_s:.3g} s: give it more time, a smaller size, fewer steps or a "
                "lower magcache.min_computed_steps",
                soonest_s=entry.eta_s,
            )
        return entry

    def use(self, planner: SchedulePlanner) -> None:
        """Plan new images with ``planner``; those that are here keep the one that they came with."""
        self._planner = planner
        self._selector = ScheduleSelector(self._settings.magcache, planner)

    def next_message(self, shape_of: Callable[[str], RowShape]) -> list[SentPlan]:
        """The plans of the next message to the ranks, noted as sent; ``shape_of`` gives a row's shape by its id."""

        estimates: list[tuple[tuple[PlanPart, ...], float]] = []

        def seconds_of(plan: StepPlan) -> float:
            # Measuring a step takes time as well, which says nothing about clients' steps.
            parts = () if plan.background else parts_of(plan, shape_of)
            estimates.append((parts, self.costs.plan_seconds(parts)))
            return estimates[-1][1]

        plans = self.scheduler.next_message(seconds_of)
        message = [SentPlan(plan, *estimate) for plan, estimate in zip(plans, estimates, strict=True)]
        self._sent_s += sum(one.seconds for one in message)
        self.counts.plans += len(message)
        self.counts.messages += bool(message)
        return message

    def on_results(self, sent: SentPlan, results: Sequence[StepResult]) -> None:
        """Update estimates and counters from the ranks' results for one plan."""
        self._sent_s -= sent.seconds
        seconds = max(result.seconds for result in results)
        if sent.plan.background:
            self.counts.calibration_seconds += seconds
            return
        idle_seconds = max(result.idle_seconds for result in results)
        split = self.costs.observe(sent.parts, seconds, idle_seconds)
        self.counts.computed_seconds += split[True]
        self.counts.reused_seconds += split[False]
        self.counts.saved_seconds += self.costs.saved_seconds(sent.parts)
        self.counts.idle_seconds += idle_seconds
        self.counts.rank_seconds = self.counts.rank_seconds or [0.0] * len(results)
        for result in results:
            self.counts.rank_seconds[result.rank] += result.seconds

    def eta_s(self, entry: RequestState) -> float:
        """Estimated seconds until the last step of an image in the table is done, or of one that just left it."""
        return self._forecast(entry).total_s()

    def load(self, job: DenoiseJob) -> dict[str, float]:
        """Images ``waiting`` and ``running``, and ``eta_s``, the estimate that ``job`` would get now."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        # Submitted and cancelled at once: the estimate needs a table entry, and no plan is formed in between.
        entry = self.scheduler.submit(job, self._planner.schedules(job))
        eta_s = self.eta_s(entry)
        self.scheduler.cancel(job.row_id)
        return {"waiting": waiting, "running": running, "eta_s": eta_s}

    def _has_place(self, job: DenoiseJob, free: int) -> bool:
        """Whether the queue takes another image: one that was promised a place, or one for which none is kept."""
        limit = self._settings.max_waiting_pictures
        places = limit + free - self.scheduler.waiting
        # An estimate that was a little short breaks no promise: the queue grows by a batch at most.
        if self._promises.is_due(job.retry_key) and places > -self._settings.max_batch_rows:
            return True
        if places > self._promises.expected:
            return True
        return places > 0 and places > self._kept_places()

    def _kept_places(self) -> float:
        """Those that newcomers do not get, while places are promised to more clients than there is room for.

        They are kept for clients who come before the next place is free; a part of the queue always goes to newcomers.
        """
        if not self._promises.expected:
            return 0.0
        half = self._settings.max_waiting_pictures / 2
        return min(self._promises.expected_within(self._forecast().place_s(1)), half)

    def _tokens(self, job: DenoiseJob) -> int:
        """Tokens of a step in which all branches compute; refuses an image whose step exceeds a batch."""
        tokens, limit = RowShape.of(job, self._settings).tokens * len(job.branches), self._settings.max_batch_tokens
        if tokens > limit:
            raise InvalidRequestError(
                f"a step of this image has {tokens} tokens, references and both CFG branches counted, and the "
                f"server's max_batch_tokens is {limit}; ask for a smaller size or give smaller source images",
                param="size",
            )
        return tokens

    def _fix_schedule(self, entry: RequestState) -> None:
        """Fix the schedule of an image that is being admitted."""
        waiting = self.scheduler.waiting
        forecast = self._forecast(entry)
        choice = self._choose(entry, forecast, forecast.place_s(waiting) if waiting else 0.0)
        entry.set_schedule(choice.schedules, choice.lowered_by)
        self.counts.admitted += 1
        self.counts.lowered_by_deadline += choice.lowered_by == "deadline"
        self.counts.lowered_by_load += choice.lowered_by == "load"

    def _choose(self, entry: RequestState, forecast: Forecast, queue_s: float) -> Choice:
        def seconds(schedules: Mapping[str, BranchSchedule]) -> float:
            return forecast.total_s(make_row_schedule(schedules))

        time_s = None if entry.deadline_s is None else entry.deadline_s - self._clock()
        assert entry.selector is not None
        return entry.selector.choose(entry.job, self._pressure(queue_s), time_s, seconds)

    def _pressure(self, queue_s: float) -> float:
        """How far load lowers quality, 0 to 1; at 1 before the queue is full, so before any image is refused."""
        elastic = self._settings.elastic
        if not elastic.enabled:
            return 0.0
        by_wait = (queue_s - elastic.start_wait_s) / (elastic.full_wait_s - elastic.start_wait_s)
        taken = self.scheduler.waiting + self._kept_places()
        by_length = 2 * taken / self._settings.max_waiting_pictures - 1
        return min(max(by_wait, by_length, 0.0), 1.0)

    def _forecast(self, entry: RequestState | None = None) -> Forecast:
        return Forecast(self.scheduler, self.costs, self._sent_s, entry)


def default_job(settings: Settings) -> DenoiseJob:
    """The job of a request that sets no option, for the warm-up and for estimates."""
    sampling, magcache = settings.sampling, settings.magcache
    return DenoiseJob(
        row_id="default/0",
        width=sampling.default_width,
        height=sampling.default_height,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        true_cfg_scale=1.0,
        seed=0,
        magcache=MagCacheOptions(
            enabled=magcache.enabled,
            mag_threshold=magcache.mag_threshold,
            mag_max_skip_steps=magcache.mag_max_skip_steps,
            mag_retention_ratio=magcache.mag_retention_ratio,
        ),
    )
