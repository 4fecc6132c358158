"""The decision machine: which step computes and which reuses. Pure; no tensors, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.plan_data import COMPUTE, REUSE, VelocityStep


@dataclass(frozen=True)
class Decision:
    """What one step does.

    Attributes:
        step: index of the denoising step, from 0.
        compute: run the block stack; otherwise reuse stored residuals.
        weights: for a reused step, the factors of the last computed residuals, newest first, whose sum stands in for
            the block stack's residual; empty for a computed step.
        accumulated_error: the rule's e after this step (0.0 when computing, or when a plan decided).
        velocity: the step's part in a run that predicts and corrects velocities; None where residuals are reused.
    """

    step: int
    compute: bool
    weights: tuple[float, ...] = ()
    accumulated_error: float = 0.0
    velocity: VelocityStep | None = None


class MagCacheState:
    """The threshold rule, one step at a time: one object per request and CFG branch.

    At a step past the retention zone: a *= ratio; s += 1; e += |1 - a|. The step reuses when a residual exists,
    e <= threshold, s <= max_skip_steps and the step is not protected; else it computes and a, s, e start again.
    (MagCache, arXiv 2506.09045, algorithm 1, and the authors' FLUX script.)
    """

    def __init__(self, config: MagCacheConfig) -> None:
        """Start at step 0 of a run with ``config``.

        Raises:
            ConfigError: ``config`` has no curve and does not measure one.
        """
        if not config.mag_ratios and not config.calibrate:
            raise ConfigError("mag_ratios", None, "a calibrated curve (see load_profile), or calibrate=True be given")
        self.config = config
        self._ratios = config.ratios
        self._protected = config.protected
        self._retained = config.retained_steps
        self.reset()

    def reset(self) -> None:
        """Forget the run: the next `step` is step 0."""
        self.next_step = 0
        self.has_residual = False
        self._restart_segment()

    def _restart_segment(self) -> None:
        self.accumulated_ratio = 1.0
        self.accumulated_steps = 0
        self.accumulated_error = 0.0

    def step(self, must_compute: bool = False) -> Decision:
        """Decide the next step and advance.

        Args:
            must_compute: compute whatever the rule says, because there is nothing that this step could reuse.

        Returns:
            The decision; a reused step has the weights of plain residual reuse, ``(1.0,)``.

        Raises:
            IndexError: all ``num_inference_steps`` steps are taken; `reset` starts another run.
        """
        step = self.next_step
        if step >= self.config.num_inference_steps:
            raise IndexError(f"all {self.config.num_inference_steps} steps are decided; reset() starts another run")
        self.next_step += 1
        if not self.config.calibrate and step >= self._retained:
            self.accumulated_ratio *= self._ratios[step]
            self.accumulated_steps += 1
            self.accumulated_error += abs(1.0 - self.accumulated_ratio)
            if (
                self.has_residual
                and not must_compute
                and self.accumulated_error <= self.config.threshold
                and self.accumulated_steps <= self.config.max_skip_steps
                and step not in self._protected
            ):
                return Decision(step, compute=False, weights=(1.0,), accumulated_error=self.accumulated_error)
            self._restart_segment()
        self.has_residual = True
        return Decision(step, compute=True)


def schedule(config: MagCacheConfig) -> str:
    """The whole schedule ahead, one character per step: ``C`` computes, ``.`` reuses."""
    state = MagCacheState(config)
    return "".join(COMPUTE if state.step().compute else REUSE for _ in range(config.num_inference_steps))


def predicted_error(config: MagCacheConfig) -> float:
    """Sum over the reused steps of |1 - product of the ratios since the last computed step| (no unit)."""
    return ratio_error(schedule(config), config.ratios)


def ratio_error(steps: str, ratios: tuple[float, ...]) -> float:
    """`predicted_error` of any schedule string over a curve of its length."""
    total, product = 0.0, 1.0
    for mark, ratio in zip(steps, ratios, strict=True):
        product = 1.0 if mark == COMPUTE else product * ratio
        total += abs(1.0 - product)
    return total
