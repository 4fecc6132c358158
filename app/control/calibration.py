"""What a calibration runs next, and the profile that comes of it. Pure: runs are yielded, their outcomes sent back.

First each prompt is run uncached and recorded; then the first is run again with single reused steps, which shows how a
displacement grows; then schedules are tried, and judged by their images. Numbers and search are those of
`magcache_core.calibrate`. Each outcome is noted in the `Findings`, with which an interrupted calibration goes on.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from app.control.findings import Findings
from app.messages import COND, CalibrationJob, CalibrationRun
from magcache_core import Profile, Trial, fewest_steps
from magcache_core.measure import growth, probe_schedule, probes
from magcache_core.plan_data import COMPUTE
from magcache_core.run_sums import BranchSums
from magcache_core.trials import distances, mean_error, search

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
    """About how many images a calibration runs: each number of computed steps has some six candidates."""
    trials = len(job.budgets) * (6 + job.moves) * min(job.trial_runs, len(job.prompts))
    return len(job.prompts) + len(probes(job.steps)) + trials


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
        self._compared = min(job.trial_runs, len(job.prompts))
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
        while found.recorded < len(job.prompts):
            if found.recorded and found.seconds > RECORDING_SHARE * job.budget_s:
                return
            number, before = found.recorded, found.sums
            every = CalibrationRun(self._every, record=True)
            grams = {branch: sums.gram for branch, sums in before.items()}
            outcome = yield from self._take(Run(job.prompts[number], every, grams, number < self._compared))
            if number == 0:
                # One reused step starts from the uncached run's latents, so the recorded run knows where it leads.
                moved = outcome.sums[COND].moved.sqrt().tolist()
                found.moved = {probe: moved[probe] for probe in probes(job.steps)}
            found.sums = {branch: before[branch] + sums if before else sums for branch, sums in outcome.sums.items()}
            found.recorded += 1
            if number < max(self._compared, 1):
                self._uncached[number] = outcome

    def _reference(self, number: int) -> Generator[Run, Outcome, Outcome]:
        """The uncached run of a prompt, made again after an interruption."""
        if number not in self._uncached:
            run = Run(self._job.prompts[number], CalibrationRun(self._every), decoded=number < self._compared)
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
        """``profile`` with trials of as many of the job's budgets as there is time for."""
        possible = range(fewest_steps(profile), profile.steps)
        for budget in self._job.budgets if self._compared else ():
            if budget not in possible:
                continue
            trying = search(profile, self._job.moves, [budget])
            candidate = next(trying)
            while True:
                errors = yield from self._errors(CalibrationRun(candidate.schedule, candidate.reuse))
                if len(errors) < self._compared:
                    return replace(profile, trials=self._with_best(profile.trials, budget))
                try:
                    candidate = trying.send(mean_error(torch.tensor(errors)))
                except StopIteration as end:
                    profile = replace(profile, trials=end.value)
                    break
        return profile

    def _with_best(self, trials: tuple[Trial, ...], budget: int) -> tuple[Trial, ...]:
        """``trials``, and the best so far of a search that time ran out for."""
        tried = [
            Trial(schedule, reuse, mean_error(torch.tensor(errors)))
            for (schedule, reuse), errors in self._findings.errors.items()
            if schedule.count(COMPUTE) == budget and len(errors) == self._compared
        ]
        best = sorted(tried, key=lambda trial: trial.error)[:1]
        return tuple(sorted([*trials, *best], key=lambda trial: trial.computed))

    def _errors(self, calibration: CalibrationRun) -> Generator[Run, Outcome, Sequence[float]]:
        """How far the images of a schedule are from the uncached ones; fewer than asked for when time is over."""
        errors = self._findings.errors.setdefault((calibration.schedule, calibration.reuse), [])
        while len(errors) < self._compared and self._findings.seconds <= self._job.budget_s:
            number = len(errors)
            reference = yield from self._reference(number)
            outcome = yield from self._take(Run(self._job.prompts[number], calibration, decoded=True))
            assert outcome.image is not None
            assert reference.image is not None
            errors.append(float(distances(outcome.image[None], reference.image[None])))
        return errors
