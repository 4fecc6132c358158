"""What predicting and correcting costs, from the inner products of an uncached run's velocities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from magcache_core.correct import lagrange

FOLLOWED = 2.0
"""What `run_costs` multiplies spans by. On flux-tiny schedules of 8 computed steps that are found with 1.5 are 3 dB
worse, and those of 10 that are found with 3 are 1 dB worse."""


@dataclass(frozen=True)
class SegmentErrors:
    """What the velocities of a segment (a computed step and the reused ones after it) get wrong.

    By computed step a, gap g to the one before (0: a is the first) and reused steps l: for each step of a run the
    coefficient of its true velocity, (steps, lengths + 1, lengths, steps). They are zero where no such segment exists.

    Attributes:
        predicted: in the latents that the next computed step sees.
        left: in the latents for good, once the segment is corrected; nothing corrects the last one.
        exists: (steps, lengths + 1, lengths).
    """

    predicted: torch.Tensor
    left: torch.Tensor
    exists: torch.Tensor


def segment_errors(sigmas: Sequence[float], lengths: int, dtype: torch.dtype = torch.float64) -> SegmentErrors:
    """The errors of all segments.

    Args:
        sigmas: noise level of each step and the final one, falling, steps + 1 values.
        lengths: longest segment, in steps, the computed one included.
    """
    levels = torch.tensor(sigmas, dtype=dtype)
    steps = len(sigmas) - 1
    axes = (steps, lengths + 1, lengths, lengths)
    a, g, length, i = (
        torch.arange(size).view([-1 if axis == k else 1 for k in range(4)]).expand(axes)
        for axis, size in enumerate(axes)
    )
    inside = i <= length
    at = (a + i).clamp(max=steps - 1)
    next_computed = (a + length + 1).clamp(max=steps)
    before = (a - g).clamp(min=0)
    moved = torch.where(inside, levels[at + 1] - levels[at], 0.0)
    truth = torch.zeros(*axes[:3], steps + 1, dtype=dtype).scatter_add_(3, at, -moved)

    def error(*nodes: torch.Tensor) -> torch.Tensor:
        """Of the polynomial through the velocities of the steps ``nodes``."""
        error = truth.clone()
        for node, weight in zip(nodes, lagrange(levels[at], [levels[node] for node in nodes]), strict=True):
            error.scatter_add_(3, node, torch.where(inside, moved * weight, 0.0))
        return error[..., :steps]

    first = g[..., :1] == 0
    predicted = torch.where(first, error(a), error(a, before))
    interpolated = torch.where(first, error(next_computed, a), error(next_computed, a, before))
    ends = next_computed[..., :1] == steps
    a, g, length = a[..., 0], g[..., 0], length[..., 0]
    exists = (a + length < steps) & (g <= a) & ((g > 0) | (a == 0))
    wrong = exists & (length > 0)
    return SegmentErrors(
        torch.where(wrong[..., None], predicted, 0.0),
        torch.where(wrong[..., None], torch.where(ends, predicted, interpolated), 0.0),
        exists,
    )


def velocity_costs(
    gram: torch.Tensor, sigmas: Sequence[float], lengths: int, share: float = 1.0, by_span: bool = False
) -> torch.Tensor:
    """Squared costs of segments, (steps, lengths + 1, lengths); entry [a, g, l] as in `costs.CostTable.segments`.

    Predicted or interpolated velocities are weighted sums of true ones, so what a segment leaves in the latents is,
    too: its square is c'Gc, with c the weights less the true velocity's, times the differences of noise levels. A
    segment costs what its interpolation leaves in the latents for good, and what its prediction does to the next
    evaluation, which sees the latents as predicted. Both count alike: ten times less for the prediction loses up to
    2 dB on flux-tiny, three times more up to 3. The last segment is never corrected.

    Args:
        gram: inner products of the velocities of two steps, (steps, steps).
        sigmas: noise level of each step and the final one, falling, steps + 1 values.
        lengths: longest segment, in steps, the computed one included.
        share: weight of the prediction; the interpolation's is 1.
        by_span: the weight is the square of ``share`` times the segment's span in noise levels instead: over so much an
            evaluation that saw displaced latents is followed.
    """
    errors = segment_errors(sigmas, lengths, gram.dtype)
    levels = torch.tensor(sigmas, dtype=gram.dtype)
    a, length = torch.arange(len(gram))[:, None, None], torch.arange(lengths)
    end = (a + length + 1).clamp(max=len(gram))
    weight = (share * (levels[a] - levels[end])) ** 2 if by_span else share
    again = torch.where(end == len(gram), 0.0, weight * squared(errors.predicted, gram))
    costs = (again + squared(errors.left, gram)).clamp(min=0.0)
    return torch.where(errors.exists, costs, torch.inf)


def run_costs(
    gram: torch.Tensor, sigmas: Sequence[float], errors: SegmentErrors, computed: torch.Tensor
) -> torch.Tensor:
    """Squared costs of whole schedules, (schedules,): mistakes of their segments add up, or cancel.

    What all segments leave in the latents is one sum, whose square is taken once; `velocity_costs` adds up squares. So
    does what an evaluation sees: what the segments before left, and the last one's prediction. That counts by the
    square of the span of noise levels over which the evaluation is followed, times `FOLLOWED`.

    Args:
        gram, sigmas: as for `velocity_costs`.
        errors: of all segments that the schedules have.
        computed: the computed steps of each schedule, rising from 0, (schedules, steps that compute).
    """
    levels = torch.tensor(sigmas, dtype=gram.dtype)
    ends = torch.nn.functional.pad(computed[:, 1:], (0, 1), value=len(gram))
    gaps = computed.diff(dim=1, prepend=computed[:, :1])
    segment = computed, gaps, ends - computed - 1
    left = errors.left[segment]  # (schedules, segments, steps)
    seen = left.cumsum(dim=1) - left + errors.predicted[segment]
    followed = FOLLOWED * (levels[ends[:, :-1]] - levels[ends[:, 1:]])
    return squared(left.sum(dim=1), gram) + (followed**2 * squared(seen[:, :-1], gram)).sum(dim=1)


def squared(coefficients: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """c'Gc of the coefficients c in the last dimension."""
    return ((coefficients @ gram) * coefficients).sum(dim=-1)
