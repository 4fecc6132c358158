"""The request table and the plans formed from it. Pure: no Ray, no tensors; the clock is given.

Each tick: drop what was cancelled or is too late, admit what has room, and advance rows by one step, with the decisions
that were fixed at their admission. Rows at different steps, sizes and settings share a plan.

A reused step costs next to nothing, so while any row reuses, the plan holds only such rows. Each row thus comes to its
next computed step at once, and then all running rows compute together. (If every row took one step of each plan, few
would happen to compute at the same time, and small batches are slow.) Only computed steps count against a batch's
token budget.

Images are ordered by *due time*: the deadline, or ``patience_s`` after the arrival if that is sooner, and
``patience_s`` earlier for each level of priority. So priority goes first, then the deadline, then the arrival; and
since a due time never changes while those of later arrivals grow, no image waits for ever.

With API keys, the keys share the group equally: images are ordered by start-time fair queueing (Goyal, Vin and Cheng,
1996). Each gets a tag, the work that its key was granted before it; a key that was idle begins at the tag of the image
that joined last, so that it is served next and has no claim on the past. Among the images of one key, the more urgent
by due time has the lower tag. No rate is estimated, so the shares hold however fast the steps are.

Rows of a calibration are in the background: they count nowhere else, and the first of them takes a step when no
client's image is there. When one comes, such a row stays where it is and goes on afterwards.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from sortedcontainers import SortedDict

from app.control.request import DueKey, RequestState, RowShape
from app.control.schedule import BranchSchedule
from app.messages.jobs import DenoiseJob
from app.messages.plans import FIRST_DIGEST, StepPlan, plan_digest
from app.settings import Settings

MESSAGE_S = 0.03
"""Work worth a message: sending and answering one takes the coordinator and a rank a millisecond each."""
MAX_PLANS_PER_MESSAGE = 16
"""Upper bound, however short the plans are."""


class StepScheduler:
    """Decides which rows take a step next.

    Invariants, tested as properties:
        - the tokens that a plan computes never exceed ``max_batch_tokens``, its rows ``max_batch_rows``;
        - a row that reuses is in the next plan, and one that computes in the next plan that computes;
        - except for a running row that is deferred in favour of more urgent ones; it is in the one after that: running
          rows have so few tokens (see `_has_room`) that the deferred ones always fit into one step, and go first;
        - no image joins before a more urgent one that has no room yet;
        - a calibration's row steps alone, and only when no image is running or waiting.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        on_admit: Callable[[RequestState], None] = lambda entry: None,
    ) -> None:
        """``on_admit`` may still change an image's schedule, just before its first step."""
        self._settings = settings
        self._clock = clock
        self._on_admit = on_admit
        self._entries: dict[str, RequestState] = {}
        self._waiting: SortedDict[DueKey, RequestState] = SortedDict()
        self._running: SortedDict[DueKey, RequestState] = SortedDict()
        self._deadlines: SortedDict[DueKey, RequestState] = SortedDict()
        self._background: deque[RequestState] = deque()
        self._tokens = 0  # of the running rows, all branches
        self._arrivals = 0
        self._fair = settings.http.api_keys_file is not None
        self._tag = 0.0  # of the image that joined last
        self._granted: dict[str, float] = {}  # work of each key's images that joined, on the scale of the tags
        self._dropped: list[str] = []
        self._too_late: list[RequestState] = []
        self._sequence = 0
        self._digest = FIRST_DIGEST

    @property
    def waiting(self) -> int:
        """Number of images not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of images admitted and not finished."""
        return len(self._running)

    @property
    def in_background(self) -> bool:
        """Whether the next plan steps a row of a calibration, if anything."""
        return bool(self._background) and not self._running and not self._waiting

    @property
    def empty(self) -> bool:
        """Whether there are no images and no drops left to send."""
        return not (self._entries or self._dropped or len(self._deadlines))

    @property
    def running_entries(self) -> list[RequestState]:
        """Running images, the most urgent first."""
        return list(self._running.values())

    @property
    def waiting_entries(self) -> Iterable[RequestState]:
        """Waiting images, the most urgent first."""
        return self._waiting.values()

    def position(self, entry: RequestState) -> int:
        """Place in the queue, from 1; 0 when it does not wait."""
        return 0 if entry.admitted_s is not None else self._waiting.bisect_left(entry.key) + 1

    def submit(self, job: DenoiseJob, schedules: Mapping[str, BranchSchedule]) -> RequestState:
        """Queue an image; its ``row_id`` must not be known already."""
        now = self._clock()
        if job.calibration is not None:
            shape = RowShape.of(job, self._settings)
            entry = RequestState(job, shape, schedules, now, (float("inf"), self._arrivals))
            self._arrivals += 1
            self._entries[job.row_id] = entry
            self._background.append(entry)
            return entry
        patience = self._settings.patience_s
        allowed = patience if job.deadline_s is None else min(patience, job.deadline_s)
        urgency_s = now + allowed - job.priority * patience
        key = self._fair_tag(job.key_name) if self._fair else urgency_s, self._arrivals
        entry = RequestState(job, RowShape.of(job, self._settings), schedules, now, key, urgency_s=urgency_s)
        self._arrivals += 1
        self._entries[job.row_id] = entry
        self._waiting[key] = entry
        if entry.deadline_key is not None:
            self._deadlines[entry.deadline_key] = entry
        if self._fair:
            self._order_by_urgency(job.key_name)
        return entry

    def waiting_of(self, key_name: str) -> list[RequestState]:
        """Waiting images of one API key, in their order."""
        return [entry for entry in self._waiting.values() if entry.job.key_name == key_name]

    def _fair_tag(self, key_name: str) -> float:
        ends = [entry.key[0] + entry.work for entry in self.waiting_of(key_name)]
        return max([self._tag, self._granted.get(key_name, 0.0), *ends])

    def _order_by_urgency(self, key_name: str) -> None:
        """Give a key's waiting images new tags by urgency, from the lowest that one of them has."""
        waiting = self.waiting_of(key_name)
        tag = waiting[0].key[0]
        for entry in waiting:
            del self._waiting[entry.key]
        for entry in sorted(waiting, key=lambda one: (one.urgency_s, one.key[1])):
            entry.key = tag, entry.key[1]
            self._waiting[entry.key] = entry
            tag += entry.work

    def free_places(self, tokens: int) -> int:
        """How many images of ``tokens`` tokens would fit into the batch beside the running rows."""
        limit = self._settings.max_batch_tokens
        for_step = limit - sum(entry.coming_cost for entry in self._running.values())
        for_batch = 2 * limit - max(self._largest(), tokens) - self._tokens
        return max(min(self._settings.max_batch_rows - self.running, for_step // tokens, for_batch // tokens), 0)

    def cancel(self, row_id: str) -> bool:
        """End an image at the next step boundary; False when it already took its last step or is unknown."""
        entry = self._entries.get(row_id)
        if entry is None:
            return False
        if entry.admitted_s is not None:
            self._dropped.append(row_id)
        self._forget(entry)
        return True

    def take_too_late(self) -> list[RequestState]:
        """The images that were ended because their deadline passed, since the last call."""
        taken, self._too_late = self._too_late, []
        return taken

    def next_message(self, seconds_of: Callable[[StepPlan], float]) -> tuple[StepPlan, ...]:
        """The next plans to send in one message; empty when there is nothing to do.

        A message ends with the first plan that returns latents or a preview, after one computed step of a calibration,
        or before a computed step once its plans are estimated to take `MESSAGE_S`. So a computed step of a large model
        is a message with the reused steps that follow it, while several of a small model share one: their steps take
        less time than a message.

        Args:
            seconds_of: the estimated time of a plan.
        """
        plans: list[StepPlan] = []
        seconds = 0.0
        while len(plans) < MAX_PLANS_PER_MESSAGE and (seconds < MESSAGE_S or self._reusing()):
            plan = self.next_plan()
            if plan is None:
                break
            plans.append(plan)
            seconds += seconds_of(plan)
            if any(row.last or row.preview for row in plan.rows) or (plan.background and _computes(plan)):
                break
        return tuple(plans)

    def next_plan(self) -> StepPlan | None:
        """The next plan for all ranks, or None when there is nothing to do."""
        now = self._clock()
        self._end_what_is_too_late(now)
        stepping, admitted = self._pack(now)
        background = not stepping and bool(self._background)
        if background:
            stepping, admitted = self._background_step(now)
        if not stepping and not self._dropped:
            return None
        plan = StepPlan(
            sequence=self._sequence,
            digest="",
            admit=tuple(replace(entry.job, computing=entry.row_schedule.round_steps) for entry in admitted),
            rows=tuple(entry.next_step() for entry in stepping),
            drop=tuple(self._dropped),
            background=background,
        )
        self._digest = plan_digest(self._digest, plan)
        self._sequence += 1
        self._dropped.clear()
        for entry in stepping:
            entry.step += 1
            if entry.remaining == 0:
                self._forget(entry)
        return replace(plan, digest=self._digest)

    def _pack(self, now: float) -> tuple[list[RequestState], list[RequestState]]:
        """The rows of the next step, and those of them that it admits; both most urgent first.

        If any row reuses, only such rows step. Otherwise running and waiting images are packed in one order, so that an
        urgent newcomer goes before less urgent running rows; room for the deferred rows is set aside first.
        """
        if reusing := self._reusing():
            return reusing, []
        running = self.running_entries
        budget = self._settings.max_batch_tokens - sum(entry.cost for entry in running if entry.deferred)
        largest = self._largest()
        stepping: list[RequestState] = []
        admitted: list[RequestState] = []
        joining = True
        for entry in [*running, None]:
            while joining and (newcomer := _first(self._waiting)) and (entry is None or newcomer.key < entry.key):
                if not self._has_room(newcomer, budget, largest, len(running) + len(admitted)):
                    joining = False  # no later image may overtake it
                    break
                self._admit(newcomer, now)
                budget -= newcomer.cost
                largest = max(largest, newcomer.tokens)
                stepping.append(newcomer)
                admitted.append(newcomer)
            if entry is None:
                break
            if entry.deferred or entry.cost <= budget:
                budget -= 0 if entry.deferred else entry.cost
                entry.deferred = False
                stepping.append(entry)
            else:
                entry.deferred = True
                joining = False
        return stepping, admitted

    def _background_step(self, now: float) -> tuple[list[RequestState], list[RequestState]]:
        """The first row in the background, and that row once more if its first step admits it."""
        entry = self._background[0]
        joining = entry.admitted_s is None
        if joining:
            entry.admitted_s = now
        return [entry], [entry] * joining

    def _has_room(self, entry: RequestState, budget: int, largest: int, rows: int) -> bool:
        """Whether an image may join: its first step fits into the budget, and no row is deferred twice in a row.

        When rows are deferred, the packed ones fill the budget B up to less than the largest row. If all running rows
        have at most 2 B - largest tokens, the deferred ones have at most B, and fit into the next step.
        """
        limit = self._settings.max_batch_tokens
        fits_step = entry.tokens <= budget  # the first step computes in all branches
        fits_batch = self._tokens + entry.tokens <= 2 * limit - max(largest, entry.tokens)
        return rows < self._settings.max_batch_rows and fits_step and fits_batch

    def _reusing(self) -> list[RequestState]:
        """The running rows whose next step only reuses, the most urgent first."""
        return [entry for entry in self._running.values() if not entry.cost]

    def _largest(self) -> int:
        return max((entry.tokens for entry in self._running.values()), default=0)

    def _admit(self, entry: RequestState, now: float) -> None:
        del self._waiting[entry.key]
        entry.admitted_s = now
        self._on_admit(entry)
        if self._fair:
            self._tag = max(self._tag, entry.key[0])
            granted = self._granted.get(entry.job.key_name, 0.0)
            self._granted[entry.job.key_name] = max(granted, entry.key[0] + entry.work)
        self._running[entry.key] = entry
        self._tokens += entry.tokens

    def _forget(self, entry: RequestState) -> None:
        del self._entries[entry.job.row_id]
        if entry.job.calibration is not None:
            self._background.remove(entry)
        elif entry.admitted_s is None:
            del self._waiting[entry.key]
        else:
            del self._running[entry.key]
            self._tokens -= entry.tokens
        if entry.deadline_key is not None:
            del self._deadlines[entry.deadline_key]

    def _end_what_is_too_late(self, now: float) -> None:
        while (entry := _first(self._deadlines)) is not None and entry.deadline_key is not None:
            if entry.deadline_key[0] > now:
                break
            self.cancel(entry.job.row_id)
            self._too_late.append(entry)


def _computes(plan: StepPlan) -> bool:
    return any(branch.compute for row in plan.rows for branch in row.branches)


def _first(ordered: SortedDict[DueKey, RequestState]) -> RequestState | None:
    """The most urgent one, or None."""
    return ordered.peekitem(0)[1] if ordered else None
