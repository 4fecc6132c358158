"""What predicting and correcting costs, from the inner products of an uncached run's velocities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from magcache_core.correct import lagrange


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
    steps = gram.shape[0]
    levels = torch.tensor(sigmas, dtype=gram.dtype)
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
    truth = torch.zeros(*axes[:3], steps + 1, dtype=gram.dtype).scatter_add_(3, at, -moved)

    def error(*nodes: torch.Tensor) -> torch.Tensor:
        """c'Gc of the polynomial through the velocities of the steps ``nodes``, (steps, lengths + 1, lengths)."""
        error = truth.clone()
        for node, weight in zip(nodes, lagrange(levels[at], [levels[node] for node in nodes]), strict=True):
            error.scatter_add_(3, node, torch.where(inside, moved * weight, 0.0))
        kept = error[..., :steps]
        return ((kept @ gram) * kept).sum(dim=-1)

    first = g[..., 0] == 0
    predicted = torch.where(first, error(a), error(a, before))
    interpolated = torch.where(first, error(next_computed, a), error(next_computed, a, before))
    ends = next_computed[..., 0] == steps
    span = (levels[a] - levels[next_computed])[..., 0]
    weight = (share * span) ** 2 if by_span else share
    costs = torch.where(ends, predicted, weight * predicted + interpolated).clamp(min=0.0)
    a, g, length = a[..., 0], g[..., 0], length[..., 0]
    exists = (a + length < steps) & (g <= a) & ((g > 0) | (a == 0))
    return torch.where(exists, torch.where(length > 0, costs, 0.0), torch.inf)
