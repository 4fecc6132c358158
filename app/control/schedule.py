"""A request's whole MagCache schedule, known at admission: per CFG branch, what each step does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

import torch

from app.engine.geometry import Geometry
from app.errors import InvalidRequestError
from app.messages.calibration import CalibrationRun
from app.messages.jobs import DenoiseJob, ImageKind, MagCacheOptions, steps_of_share
from app.messages.plans import BranchStep
from app.settings import Settings
from magcache_core import (
    ConfigError,
    Decision,
    Plan,
    Profile,
    ProfileError,
    choose,
    decisions,
    fewest_steps,
    load_profile,
    pick_profile,
    profile_names,
    stored_profiles,
    was_measured_for,
)
from magcache_core.expected import QualityScale


@dataclass(frozen=True, eq=False)
class BranchSchedule:
    """All decisions of one CFG branch. Jobs with equal settings share one, and it is compared by identity.

    Attributes:
        residuals_kept: computed residuals that the branch keeps for later steps; 0 when nothing is reused.
        predicted_error: what `magcache_core` expects the reused steps to cost.
        uncached_reason: why every step computes though reuse was asked for, or None.
        profile: name and version of the profile that it was planned with, or None.
        predicted_psnr_db: mean PSNR against the uncached images that the profile's trials let expect, or None.
        floor_db: the PSNR that its number of computed steps was chosen for, or None.
        plan_reason: why it is another one than the profile recommends, though nothing was asked for, or None.
    """

    decisions: tuple[Decision, ...]
    residuals_kept: int
    predicted_error: float
    uncached_reason: str | None = None
    profile: str | None = None
    predicted_psnr_db: float | None = None
    floor_db: float | None = None
    plan_reason: str | None = None

    @cached_property
    def text(self) -> str:
        """One character per step: ``C`` computes, ``.`` reuses."""
        return "".join("C" if decision.compute else "." for decision in self.decisions)


@dataclass(frozen=True, eq=False)
class RowSchedule:
    """The schedules of a row's CFG branches, step by step; rows with equal schedules share one.

    Attributes:
        steps: what each branch does, by step.
        velocities: ``move`` and ``estimate`` of a `RowStep`, by step; empty where residuals are reused.
        computing: how many branches compute, by step.
        computed: branch evaluations computed before each step, and in all.
        rounds: steps before each step at which some branch computed, and in all.
        round_steps: the steps at which some branch computes.
    """

    steps: tuple[tuple[BranchStep, ...], ...]
    velocities: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    computing: tuple[int, ...]
    computed: tuple[int, ...]
    rounds: tuple[int, ...]
    round_steps: tuple[int, ...]

    @property
    def reused(self) -> int:
        """Branch evaluations that reuse."""
        return len(self.steps) * len(self.steps[0]) - self.computed[-1]

    def step_after(self, step: int, rounds: int) -> int:
        """The step reached from ``step`` after ``rounds`` more computed steps and the reused steps behind them."""
        reached = self.rounds[step] + rounds
        return self.round_steps[reached] if reached < len(self.round_steps) else len(self.steps)


def make_row_schedule(schedules: Mapping[str, BranchSchedule]) -> RowSchedule:
    """Combine the schedules of a row's CFG branches, by name."""
    return _combine(tuple(schedules.items()))


@lru_cache(maxsize=4096)
def _combine(schedules: tuple[tuple[str, BranchSchedule], ...]) -> RowSchedule:
    by_branch = [
        [BranchStep(name, made.compute, made.weights, schedule.residuals_kept) for made in schedule.decisions]
        for name, schedule in schedules
    ]
    steps = tuple(zip(*by_branch, strict=True))
    velocities = tuple(
        ((), ()) if made.velocity is None else (made.velocity.move, made.velocity.estimate)
        for made in schedules[0][1].decisions
    )
    computing = tuple(sum(part.compute for part in parts) for parts in steps)
    computed = [0]
    for count in computing:
        computed.append(computed[-1] + count)
    round_steps = tuple(step for step, count in enumerate(computing) if count)
    rounds = tuple(bisect_left(round_steps, step) for step in range(len(steps) + 1))
    return RowSchedule(steps, velocities, computing, tuple(computed), rounds, round_steps)


class NoiseSchedule(Protocol):
    """What planning needs to know about the model; `app.engine.sampling.FlowMatchSampler` has it."""

    @property
    def uncached_reason(self) -> str:
        """Why every step computes when there is no MagCache profile."""

    def sigmas(self, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
        """Noise levels from 1 down to 0, (steps + 1,)."""


@dataclass(frozen=True, eq=False)
class _FoundProfile:
    """A profile, cut to the steps that run, and the name and version of the whole one."""

    profile: Profile
    label: str

    @cached_property
    def scale(self) -> QualityScale:
        """What its trials say of quality; nothing for image-to-image, which they did not try."""
        return QualityScale(self.profile)


@dataclass(frozen=True)
class _Conditions:
    """What decides which profile a job gets; ``true_cfg_scale`` is 1 where true CFG does not run."""

    steps: int
    first_step: int
    width: int
    height: int
    guidance_scale: float
    true_cfg_scale: float

    @classmethod
    def of(cls, job: DenoiseJob) -> _Conditions:
        """Those of ``job``."""
        scale = max(job.true_cfg_scale, 1.0)
        return cls(job.num_inference_steps, job.first_step, job.width, job.height, job.guidance_scale, scale)


class SchedulePlanner:
    """Turns a job's MagCache options, the server's settings and the model's profile into decisions."""

    def __init__(self, settings: Settings, noise: NoiseSchedule) -> None:
        self._settings = settings
        self._noise = noise
        named = settings.magcache.profile
        self._named = load_profile(named) if named is not None else None
        folder = settings.magcache.profile_folder
        self._stored = [] if folder is None else stored_profiles(folder)
        # Jobs with equal settings share one plan, which costs milliseconds to find.
        self._plan = lru_cache(maxsize=4096)(self._plan_branch)
        self._profile = lru_cache(maxsize=1024)(self._find_profile)

    def schedules(self, job: DenoiseJob, options: MagCacheOptions | None = None) -> dict[str, BranchSchedule]:
        """The schedule of each CFG branch of ``job``; the branches' curves may differ.

        Args:
            options: to follow instead of the job's own.

        Raises:
            magcache_core.ConfigError: ``computed_steps`` cannot be met with the other settings.
            InvalidRequestError: ``min_computed_steps`` is more than ``computed_share`` computes.
        """
        if job.calibration is not None:
            return dict.fromkeys(job.branches, self._dictated(job, job.calibration))
        followed = self._with_budget(job, job.magcache if options is None else options)
        conditions = _Conditions.of(job)
        return {branch: self._plan(followed, conditions, branch) for branch in job.branches}

    def _dictated(self, job: DenoiseJob, run: CalibrationRun) -> BranchSchedule:
        """The schedule that a calibration wants to be run; one that is recorded keeps each step's residual."""
        sigmas = self._noise.sigmas(job.num_inference_steps, Geometry.of(job.width, job.height).tokens).tolist()
        decided = decisions(Plan(run.schedule, run.reuse, products=run.products), sigmas)
        return BranchSchedule(decided, max(int(run.record), *(len(one.weights) for one in decided)), 0.0)

    def _with_budget(self, job: DenoiseJob, options: MagCacheOptions) -> MagCacheOptions:
        """``options`` with the number of computed steps that their share, or the quality guard's choice, stands for.

        Without a profile there is none.
        """
        if options.computed_share is None:
            return self._guarded(job, options)
        fewest = self.fewest(job, options)
        if fewest is None:
            return replace(options, computed_share=None)
        reaching = self._reaching(job, options)
        # A share such as 0.1 of 30 steps must not become 4 by rounding in binary.
        share = steps_of_share(options.computed_share, job.steps_to_run)
        budget = max(share if reaching is None else reaching, fewest)
        if (options.min_computed_steps or 0) > budget:
            raise InvalidRequestError(
                f"magcache.min_computed_steps is {options.min_computed_steps}, above the {budget} steps that the "
                "request's quality computes",
                param="magcache.min_computed_steps",
            )
        floor_db = None if reaching is None else options.floor_db
        return replace(options, computed_steps=budget, computed_share=None, floor_db=floor_db)

    def _reaching(self, job: DenoiseJob, options: MagCacheOptions) -> int | None:
        """The fewest computed steps whose trials reached the floor of ``options``; None where trials don't say.

        They were run with the profile's own number of steps, without true CFG, and with no other bounds on schedules.
        """
        found = self._profile(_Conditions.of(job))
        bounded = options.mag_max_skip_steps is not None or options.mag_retention_ratio is not None
        if found is None or options.floor_db is None or bounded or len(job.branches) > 1:
            return None
        tried = job.steps_to_run == found.profile.steps
        return found.scale.fewest_reaching(options.floor_db) if tried else None

    def _guarded(self, job: DenoiseJob, options: MagCacheOptions) -> MagCacheOptions:
        """``options`` with the quality guard's choice for the kind of image that ``job`` is, if it made one."""
        plain = replace(options, guard_budgets=())
        found = self._profile(_Conditions.of(job)) if options.guard_budgets and options.computed_steps is None else None
        if found is None:
            return plain
        kind = ImageKind(found.label, job.steps_to_run, len(job.branches) > 1)
        budget = dict(options.guard_budgets).get(kind)
        fewest = self.fewest(job, options)
        if budget is None or fewest is None:
            return plain
        return replace(plain, computed_steps=max(budget, fewest), mag_threshold=None)

    def fewest(self, job: DenoiseJob, options: MagCacheOptions) -> int | None:
        """The fewest computed steps that a plan for ``job`` can have; None where there is no profile to plan with."""
        found = self._profile(_Conditions.of(job))
        if found is None:
            return None
        return max(
            fewest_steps(
                found.profile,
                job.steps_to_run,
                branch=branch,
                max_skip_steps=options.mag_max_skip_steps,
                retention_ratio=options.mag_retention_ratio,
            )
            for branch in job.branches
        )

    def _find_profile(self, asked: _Conditions) -> _FoundProfile | None:
        request = self._settings.model, asked.steps, asked.width, asked.height
        guidance = asked.guidance_scale, asked.true_cfg_scale
        own = [one for one in self._stored if was_measured_for(one, *request, *guidance)]
        profile = self._named
        if own or profile is None:
            shipped = map(load_profile, profile_names())
            try:
                profile = pick_profile(*request, own or [*self._stored, *shipped], *guidance)
            except ProfileError:
                return None
        return _FoundProfile(profile.tail(asked.first_step, asked.steps), f"{profile.name}@{profile.version}")

    def _plan_branch(self, options: MagCacheOptions, asked: _Conditions, branch: str) -> BranchSchedule:
        found = self._profile(asked) if options.enabled else None
        steps_to_run = asked.steps - asked.first_step
        if found is None:
            if options.enabled and options.computed_steps is not None:
                allowed = "left out: there is no MagCache profile for this model to plan with"
                raise ConfigError("computed_steps", options.computed_steps, allowed)
            every = tuple(Decision(step, compute=True) for step in range(steps_to_run))
            return BranchSchedule(every, 0, 0.0, self._noise.uncached_reason if options.enabled else None)
        plan = choose(
            found.profile,
            steps_to_run,
            branch=branch,
            threshold=options.mag_threshold,
            max_skip_steps=options.mag_max_skip_steps,
            retention_ratio=options.mag_retention_ratio,
            budget=options.computed_steps,
            guidance_scale=asked.guidance_scale,
            true_cfg_scale=asked.true_cfg_scale,
        )
        sigmas = self._noise.sigmas(asked.steps, Geometry.of(asked.width, asked.height).tokens)
        decided = decisions(plan, sigmas[asked.first_step :].tolist())
        residuals_kept = max(len(decision.weights) for decision in decided)
        return BranchSchedule(
            decided,
            residuals_kept,
            plan.predicted_error,
            profile=found.label,
            predicted_psnr_db=None if asked.true_cfg_scale > 1 else found.scale.psnr_db(plan),
            floor_db=options.floor_db,
            plan_reason=plan.reason or None,
        )
