"""A schedule for predicted and corrected velocities that is the best as a whole, by a search without runs.

Dynamic programming adds up what segments cost, each for itself. What they leave in the latents has a sign: mistakes of
one segment may make up for those of another, and no recursion over segments sees it. Here whole schedules are compared
(`velocity_costs.run_costs`), and one computed step after another moves to where it makes the schedule cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from magcache_core.plan_data import computed_steps, schedule_of
from magcache_core.velocity_costs import run_costs, segment_errors


def best_as_a_whole(
    gram: torch.Tensor, sigmas: Sequence[float], starts: Sequence[str], longest: int, forced: Sequence[bool]
) -> str:
    """The cheapest schedule that is found from any of ``starts`` by moving one computed step at a time.

    Args:
        gram: inner products of the velocities of two steps, (steps, steps) in float64.
        sigmas: noise level of each step and the final one, falling, steps + 1 values.
        starts: schedules with equally many computed steps, the first step among them.
        longest: most reused steps in a row.
        forced: for each step, whether it must compute.
    """
    errors = segment_errors(sigmas, longest + 1, gram.dtype)

    def costs(schedules: torch.Tensor) -> torch.Tensor:
        return run_costs(gram, sigmas, errors, schedules)

    found: list[tuple[float, torch.Tensor]] = []
    for start in starts:
        best = torch.tensor([computed_steps(start)])
        cost = float(costs(best))
        while len(moved := _moved(best[0], len(gram), longest, forced)):
            tried = costs(moved)
            index = int(tried.argmin())
            if not float(tried[index]) < cost:
                break
            best, cost = moved[index : index + 1], float(tried[index])
        found.append((cost, best[0]))
    return schedule_of(min(found, key=lambda one: one[0])[1].tolist(), len(gram))


def _moved(computed: torch.Tensor, steps: int, longest: int, forced: Sequence[bool]) -> torch.Tensor:
    """All schedules with one computed step elsewhere, (schedules, steps that compute)."""
    kept = set(computed.tolist())
    free = [index for index, step in enumerate(computed.tolist()) if step and not forced[step]]
    reused = torch.tensor([step for step in range(steps) if step not in kept], dtype=computed.dtype)
    moved = computed.repeat(len(free), len(reused), 1)
    for row, index in enumerate(free):
        moved[row, :, index] = reused
    moved = moved.flatten(0, 1).sort(dim=1).values
    gaps = moved.diff(dim=1, append=torch.full((len(moved), 1), steps))
    return moved[gaps.amax(dim=1) <= longest + 1] if len(moved) else moved
