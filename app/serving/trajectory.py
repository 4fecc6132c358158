"""A request's whole MagCache trajectory, known at admission: per CFG branch, what each step does."""

from dataclasses import dataclass
from typing import Any

from app.engine.messages import COND, DenoiseJob
from app.engine.sampling import FlowMatchSampler, Geometry
from app.settings import Settings
from magcache_core import Decision, MagCacheConfig, Profile, decisions, load_profile, pick_profile, predicted_error


@dataclass(frozen=True)
class Trajectory:
    """All decisions of one CFG branch.

    Attributes:
        history: computed residuals that the branch keeps for later steps; 0 when nothing is reused.
        predicted_error: the rule's error summed over the reused steps.
    """

    decisions: tuple[Decision, ...]
    history: int
    predicted_error: float

    @property
    def schedule(self) -> str:
        """One character per step: ``C`` computes, ``.`` reuses."""
        return "".join("C" if decision.compute else "." for decision in self.decisions)


class TrajectoryPlanner:
    """Turns a job's MagCache options, the server's settings and the model's profile into decisions."""

    def __init__(self, settings: Settings, sampler: FlowMatchSampler) -> None:
        self._settings = settings
        self._sampler = sampler
        named = settings.magcache.profile
        self._profile = load_profile(named) if named is not None else None

    def trajectories(self, job: DenoiseJob) -> dict[str, Trajectory]:
        """The trajectory of each CFG branch of ``job``; the branches' curves may differ."""
        return {branch: self._trajectory(job, branch) for branch in job.branches}

    def _trajectory(self, job: DenoiseJob, branch: str) -> Trajectory:
        if not job.magcache.enabled:
            computed = tuple(Decision(step, compute=True) for step in range(job.num_inference_steps))
            return Trajectory(computed, history=0, predicted_error=0.0)
        profile = self._profile or pick_profile(self._settings.model, job.num_inference_steps, job.width, job.height)
        config = magcache_config(job, profile, branch)
        sigmas = self._sampler.sigmas(job.num_inference_steps, Geometry.of(job.width, job.height).tokens)
        steps = decisions(config, sigmas.tolist(), profile.reuse)
        history = max(len(decision.weights) for decision in steps)
        return Trajectory(steps, history, predicted_error(config))


def magcache_config(job: DenoiseJob, profile: Profile, branch: str) -> MagCacheConfig:
    """The rule's settings for one branch of a job: the job's values where it has some, else the profile's."""
    overrides: dict[str, Any] = {
        "threshold": job.magcache.mag_threshold,
        "max_skip_steps": job.magcache.mag_max_skip_steps,
        "retention_ratio": job.magcache.mag_retention_ratio,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    # A profile measured without true CFG has one curve, which then serves both branches.
    known = branch if branch in profile.branches else COND
    return profile.config(num_inference_steps=job.num_inference_steps, branch=known, **given)
