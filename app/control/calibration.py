"""What a calibration runs next, and the profile that comes of it. Pure: runs are yielded, their outcomes sent back.

First each prompt but the held-out ones is run uncached and recorded; then the first is run again with single reused
steps, which shows how a displacement grows; then schedules are tried, and the closest judged by the images of held-out
prompts. Numbers and search are those of `magcache_core.calibrate`. Each outcome is noted in the `Findings`, with which
an interrupted calibration goes on.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from app.control.findings import Findings
from app.control.preset_budgets import next_budget
from app.messages.calibration import CalibrationJob, CalibrationRun
from app.messages.jobs import COND
from magcache_core import Profile, Trial, fewest_steps, fill
from magcache_core.measure import growth, probe_schedule, probes
from magcache_core.plan_data import COMPUTE
from magcache_core.run_sums import BranchSums
from magcache_core.trials import FINALISTS, distances, finalists, mean_error, never_rising, search

REUSE = "corrected"
"""The reuse mode that profiles recommend; trials are free to find another."""
RECORDING_SHARE = 0.5
"""Share of the time after which no further run is recorded, so that there is time for trials."""


@dataclass(frozen=True, eq=False)
class Run:
    """One image to run with seed 0; ``grams`` are for a recorded one, and ``decoded`` asks for its image."""

    prompt: str
    calibration: CalibrationRun
    grams: Mapping[str, torch.Tensor] = field(default_factory=dict)
    decoded: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a `Run` gave.

    Attributes:
        latents: (image_tokens, channels).
        seconds: the time that it took.
        sums: of a recorded run, by CFG branch.
        image: (3, height, width) in [0, 1], as served.
    """

    latents: torch.Tensor
    seconds: float
    sums: Mapping[str, BranchSums] = field(default_factory=dict)
    image: torch.Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """What is calibrated.

    Attributes:
        name: of the profile.
        model: the model's id.
        transformer: the class of its transformer.
        sigmas: noise levels of the runs, with the final one.
        provenance: what else the profile says of its origin.
    """

    name: str
    model: str
    transformer: str
    sigmas: tuple[float, ...]
    provenance: Mapping[str, Any]


Runs = Generator[Run, Outcome, Any]


def expected_runs(job: CalibrationJob) -> int:
    """About how many images a calibration runs: each number of computed steps has some eight candidates.

    Each floor is taken to need two more numbers.
    """
    recorded = len(job.recorded_prompts)
    compared = min(job.trial_runs, recorded)
    judging = FINALISTS * job.judge_runs if compared else 0
    each = (8 + job.moves) * compared + judging
    references = job.judge_runs if compared else 0
    return recorded + references + len(probes(job.steps)) + (len(job.budgets) + 2 * len(job.floors_db)) * each


def calibration(job: CalibrationJob, subject: Subject, findings: Findings) -> Generator[Run, Outcome, Profile]:
    """Yields the runs of a calibration, is sent their outcomes, and returns the profile.

    Args:
        findings: what is known; it is added to.
    """
    return (yield from _Calibration(job, subject, findings).run())


class _Calibration:
    def __init__(self, job: CalibrationJob, subject: Subject, findings: Findings) -> None:
        self._job = job
        self._subject = subject
        self._findings = findings
        self._uncached: dict[int, Outcome] = {}  # by prompt, those that others are compared with
        self._recorded = job.recorded_prompts
        self._chosen_on = range(min(job.trial_runs, len(self._recorded)))
        self._judged_on = range(len(self._recorded), len(job.prompts)) if self._chosen_on else range(0)
        self._every = COMPUTE * job.steps

    def run(self) -> Generator[Run, Outcome, Profile]:
        yield from self._record()
        yield from self._probe()
        return (yield from self._try_schedules(self._measured()))

    def _take(self, run: Run) -> Generator[Run, Outcome, Outcome]:
        outcome = yield run
        self._findings.runs += 1
        self._findings.seconds += outcome.seconds
        return outcome

    def _record(self) -> Runs:
        job, found = self._job, self._findings
        while found.recorded < len(self._recorded):
            if found.recorded and found.seconds > RECORDING_SHARE * job.budget_s:
                return
            number, before = found.recorded, found.sums
            every = CalibrationRun(self._every, record=True)
            grams = {branch: sums.gram for branch, sums in before.items()}
            outcome = yield from self._take(Run(job.prompts[number], every, grams, number in self._chosen_on))
            if number == 0:
                # One reused step starts from the uncached run's latents, so the recorded run knows where it leads.
                moved = outcome.sums[COND].moved.sqrt().tolist()
                found.moved = {probe: moved[probe] for probe in probes(job.steps)}
            found.sums = {branch: before[branch] + sums if before else sums for branch, sums in outcome.sums.items()}
            found.recorded += 1
            if number < max(len(self._chosen_on), 1):
                self._uncached[number] = outcome

    def _reference(self, number: int) -> Generator[Run, Outcome, Outcome]:
        """The uncached run of a prompt that is held out, or made again after an interruption."""
        if number not in self._uncached:
            run = Run(
                self._job.prompts[number],
                CalibrationRun(self._every),
                decoded=number in self._chosen_on or number in self._judged_on,
            )
            self._uncached[number] = yield from self._take(run)
        return self._uncached[number]

    def _probe(self) -> Runs:
        job, found = self._job, self._findings
        for probe in probes(job.steps):
            if probe not in found.ended:
                reference = yield from self._reference(0)
                run = Run(job.prompts[0], CalibrationRun(probe_schedule(job.steps, probe)))
                outcome = yield from self._take(run)
                found.ended[probe] = float((outcome.latents.float() - reference.latents.float()).norm())

    def _measured(self) -> Profile:
        """The profile without trials."""
        job, subject, found = self._job, self._subject, self._findings
        sensitivity = growth({probe: (found.moved[probe], found.ended[probe]) for probe in found.ended}, job.steps)
        return Profile(
            name=subject.name,
            model=subject.model,
            transformer=subject.transformer,
            steps=job.steps,
            width=job.width,
            height=job.height,
            guidance_scale=job.guidance_scale,
            true_cfg_scale=None if job.negative_prompt is None else job.true_cfg_scale,
            sigmas=tuple(round(sigma, 6) for sigma in subject.sigmas[: job.steps]),
            branches={branch: sums.curve(sensitivity) for branch, sums in found.sums.items()},
            reuse=REUSE,
            budget=job.computed_steps,
            provenance={"source": "measured by the service", "runs": found.recorded, **subject.provenance},
        )

    def _try_schedules(self, profile: Profile) -> Generator[Run, Outcome, Profile]:
        """``profile`` with trials of as many numbers of computed steps as there is time for."""
        possible = range(fewest_steps(profile), profile.steps)
        waiting = [budget for budget in self._job.budgets if budget in possible]
        while self._chosen_on:
            budget = waiting.pop(0) if waiting else next_budget(self._job.floors_db, profile.trials, possible)
            if budget is None:
                break
            closest = yield from self._search(profile, budget)
            if not closest:
                break
            best = yield from self._judge(profile, closest)
            profile = replace(profile, trials=never_rising([*profile.trials, best]))
        if not profile.trials:
            return profile
        split = {"chosen_on_first": len(self._chosen_on), "judged_on_last": len(self._judged_on)}
        return replace(profile, provenance={**profile.provenance, "trials": split})

    def _search(self, profile: Profile, budget: int) -> Generator[Run, Outcome, list[Trial]]:
        """The closest schedules found for ``budget``, the closest first; of those tried so far when time is over."""
        trying = search(profile, self._job.moves, [budget])
        candidate = next(trying)
        chosen_on = self._chosen_on
        while self._in_time:
            run = CalibrationRun(candidate.schedule, candidate.reuse, products=candidate.products)
            errors = yield from self._errors(self._findings.errors, run, chosen_on)
            if len(errors) < len(chosen_on):
                break
            try:
                candidate = trying.send(mean_error(torch.tensor(errors)))
            except StopIteration:
                break
        tried = [
            Trial(schedule, reuse, mean_error(torch.tensor(errors)))
            for (schedule, reuse), errors in self._findings.errors.items()
            if len(errors) == len(chosen_on)
        ]
        return finalists(tried, budget)

    def _judge(self, profile: Profile, closest: Sequence[Trial]) -> Generator[Run, Outcome, Trial]:
        """The best of ``closest`` on the held-out prompts; when time is over the first is the only one that is run."""
        if not self._judged_on:
            return closest[0]
        judged: list[Trial] = []
        for trial in closest:
            if judged and not self._in_time:
                break
            products = fill(profile, trial.schedule, trial.reuse).products
            run = CalibrationRun(trial.schedule, trial.reuse, products=products)
            errors = yield from self._errors(self._findings.judged, run, self._judged_on, hurried=False)
            judged.append(replace(trial, error=mean_error(torch.tensor(errors))))
        return min(judged, key=lambda trial: trial.error)

    @property
    def _in_time(self) -> bool:
        return self._findings.seconds <= self._job.budget_s

    def _errors(
        self,
        known: dict[tuple[str, str], list[float]],
        calibration: CalibrationRun,
        prompts: range,
        hurried: bool = True,
    ) -> Generator[Run, Outcome, Sequence[float]]:
        """How far the images of a schedule are from the uncached ones, noted in ``known``.

        Args:
            hurried: fewer than asked for when time is over.
        """
        errors = known.setdefault((calibration.schedule, calibration.reuse), [])
        while len(errors) < len(prompts) and (self._in_time or not hurried):
            number = prompts[len(errors)]
            reference = yield from self._reference(number)
            outcome = yield from self._take(Run(self._job.prompts[number], calibration, decoded=True))
            assert outcome.image is not None
            assert reference.image is not None
            errors.append(float(distances(outcome.image[None], reference.image[None])))
        return errors
