"""A request's whole MagCache trajectory, known at admission: per CFG branch, what each step does."""

from dataclasses import dataclass
from functools import lru_cache

from app.engine.geometry import Geometry
from app.engine.messages import DenoiseJob, MagCacheOptions
from app.engine.sampling import FlowMatchSampler
from app.settings import Settings
from magcache_core import Decision, choose, decisions, load_profile, pick_profile


@dataclass(frozen=True)
class Trajectory:
    """All decisions of one CFG branch.

    Attributes:
        history: computed residuals that the branch keeps for later steps; 0 when nothing is reused.
        predicted_error: what `magcache_core` expects the reused steps to cost.
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
        # Requests with equal settings share one plan, which costs milliseconds to find.
        self._plan = lru_cache(maxsize=1024)(self._plan_branch)

    def trajectories(self, job: DenoiseJob) -> dict[str, Trajectory]:
        """The trajectory of each CFG branch of ``job``; the branches' curves may differ.

        Raises:
            magcache_core.ConfigError: ``computed_steps`` cannot be met with the other settings.
        """
        return {
            branch: self._plan(job.magcache, job.num_inference_steps, job.width, job.height, branch)
            for branch in job.branches
        }

    def _plan_branch(self, options: MagCacheOptions, steps: int, width: int, height: int, branch: str) -> Trajectory:
        if not options.enabled:
            return Trajectory(tuple(Decision(step, compute=True) for step in range(steps)), 0, 0.0)
        profile = self._profile or pick_profile(self._settings.model, steps, width, height)
        plan = choose(
            profile,
            steps,
            branch=branch,
            threshold=options.mag_threshold,
            max_skip_steps=options.mag_max_skip_steps,
            retention_ratio=options.mag_retention_ratio,
            budget=options.computed_steps,
        )
        sigmas = self._sampler.sigmas(steps, Geometry.of(width, height).tokens).tolist()
        decided = decisions(plan, sigmas)
        history = max(len(decision.weights) for decision in decided)
        return Trajectory(decided, history, plan.predicted_error)
