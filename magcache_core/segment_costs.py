"""What each segment of a schedule adds to its predicted error: what planning chooses by.

A segment is one computed step and the reused ones after it. Its cost depends on where it begins, on its length and,
when the reuse extrapolates, on the gap to the computed step before. The costs are measured in latent space
(`magcache_core.costs`), or follow from the magnitude ratios where nothing else was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from magcache_core.config import MagCacheConfig
from magcache_core.correct import VELOCITY_MODES
from magcache_core.costs import CostTable
from magcache_core.fit import resample_gram
from magcache_core.profile_data import Profile
from magcache_core.resample import interpolate, positions
from magcache_core.velocity_costs import velocity_costs


@dataclass(frozen=True)
class SegmentCosts:
    """What each segment adds to a schedule's predicted error.

    Attributes:
        values: (steps, gaps + 1, lengths); [a, g, l] for l reused steps after a computed step a that follows the
            computed step a - g (0: it is the first).
        unit: ``latent``: values are squared latent distances, whose sum's root is the error. ``ratio``: they add up.
    """

    values: torch.Tensor
    unit: str

    def error(self, total: float) -> float:
        """The predicted error of a schedule whose segments' values add up to ``total``."""
        return math.sqrt(total) if self.unit == "latent" else total

    def estimate(self, step: int, gap: int, length: int) -> float:
        """The value of a segment, finite where anything was measured at this step.

        After a gap wider than any measured the widest one counts; in a run longer than any measured the latents are
        taken to drift on in proportion, so that the squared distance grows with the square of the length.
        """
        known = self.values[step].isfinite()
        if not known[gap, length]:
            measured = known[: gap + 1, 1:]
            gap = int(measured.any(dim=1).nonzero().amax()) if measured.any() else gap
            longest = int(known[gap].nonzero().amax())
            if longest > 0:
                return float(self.values[step, gap, longest]) * (length / longest) ** 2
        return float(self.values[step, gap, length])


def segment_costs(profile: Profile, config: MagCacheConfig, reuse: str, branch: str = "cond") -> SegmentCosts:
    """The costs to plan with: measured ones where the profile has them, else from its ratios."""
    lengths = config.max_skip_steps + 1
    table = profile.branch(branch).costs
    if table is None:
        return SegmentCosts(_ratio_costs(config), "ratio")
    if reuse in VELOCITY_MODES and table.velocities is not None and profile.sigmas:
        return SegmentCosts(corrected_costs(table, profile.sigmas, config.num_inference_steps, lengths), "latent")
    costs = table.final(table.nearest_mode(reuse), config.num_inference_steps, lengths)
    return SegmentCosts(costs.square(), "latent")


@lru_cache(maxsize=64)
def corrected_costs(
    table: CostTable, sigmas: tuple[float, ...], steps: int, lengths: int, share: float = 1.0, by_span: bool = False
) -> torch.Tensor:
    """`velocity_costs` of a run of ``steps`` steps; ``sigmas`` are the measured run's."""
    assert table.velocities is not None
    at = positions(steps, len(sigmas))
    levels = [interpolate(range(0, -len(sigmas), -1), sigmas, -position) for position in at]
    return velocity_costs(resample_gram(table.velocities, steps), [*levels, 0.0], lengths, share, by_span).float()


def _ratio_costs(config: MagCacheConfig) -> torch.Tensor:
    """Sum of |1 - product of ratios since the computed step| over a segment's reused steps, whatever the gap."""
    steps, lengths = config.num_inference_steps, config.max_skip_steps + 1
    ahead = torch.tensor([*config.ratios[1:], *[1.0] * lengths], dtype=torch.float32)
    products = ahead.unfold(0, lengths - 1, 1)[:steps].cumprod(dim=1)  # [a, l - 1]: ratios of a + 1 ... a + l
    costs = torch.zeros(steps, lengths)
    costs[:, 1:] = (1 - products).abs().cumsum(dim=1)
    reach = torch.arange(steps)[:, None] + torch.arange(lengths)[None, :]
    costs[reach >= steps] = torch.inf
    return costs[:, None, :].expand(steps, lengths + 1, lengths)
