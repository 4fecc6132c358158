"""Predict and correct written out: step by step, with polynomials fitted anew each time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def polynomial(levels: list[float], values: list[torch.Tensor]) -> Callable[[float, float, bool], torch.Tensor]:
    """The polynomial through ``values`` at ``levels``: its value at the first level given, or its mean between both."""
    powers = np.vander(np.array(levels, dtype=np.float64), increasing=True)
    stacked = np.stack([value.double().numpy() for value in values])
    coefficients = np.linalg.solve(powers, stacked.reshape(len(levels), -1))

    def at(begin: float, end: float, mean: bool) -> torch.Tensor:
        orders = range(len(levels))
        if mean:
            terms = [(end ** (p + 1) - begin ** (p + 1)) / (p + 1) / (end - begin) for p in orders]
        else:
            terms = [begin**p for p in orders]
        return torch.from_numpy((np.array(terms) @ coefficients).reshape(stacked.shape[1:]))

    return at


class SlowRun:
    """One run, step by step."""

    def __init__(self, sigmas: list[float], schedule: str, integrated: bool = False) -> None:
        self.sigmas = sigmas
        self.schedule = schedule
        self.integrated = integrated
        self.step = 0
        self.computed: list[tuple[int, torch.Tensor]] = []  # newest first
        self.predicted: torch.Tensor | None = None  # since the last computed step
        self.estimates: list[torch.Tensor] = []

    def advance(self, latents: torch.Tensor, velocity: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The latents after the next step, in double precision."""
        step, latents = self.step, latents.double()
        if self.schedule[step] == "C":
            self.computed.insert(0, (step, velocity().double()))
            if len(self.computed) > 1:
                last = self.computed[1][0]
                latents = latents + self.moved(3, range(last, step)) - self.predicted
            self.predicted = torch.zeros_like(latents)
        rate = self.through(2)(self.sigmas[step], 0.0, False)
        self.estimates.append(latents - self.sigmas[step] * rate)
        moved = self.moved(2, range(step, step + 1))
        self.predicted = self.predicted + moved
        self.step += 1
        return latents + moved

    def through(self, most: int) -> Callable[[float, float, bool], torch.Tensor]:
        known = self.computed[:most]
        return polynomial([self.sigmas[step] for step, _ in known], [value for _, value in known])

    def moved(self, most: int, steps: range) -> torch.Tensor:
        rate, sigmas = self.through(most), self.sigmas
        return sum((sigmas[q + 1] - sigmas[q]) * rate(sigmas[q], sigmas[q + 1], self.integrated) for q in steps)


def slow_run(
    velocity: Callable[[torch.Tensor, int], torch.Tensor],
    latents: torch.Tensor,
    sigmas: list[float],
    schedule: str,
    integrated: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The latents after a run, and by step the estimate of where it ends; ``velocity`` is told latents and step."""
    run = SlowRun(sigmas, schedule, integrated)
    for step in range(len(schedule)):
        latents = run.advance(latents, lambda x=latents, i=step: velocity(x, i))
    return latents, run.estimates


def levels(steps: int) -> list[float]:
    """Shifted as FLUX's are, not evenly spaced."""
    return [3 * t / (1 + 2 * t) for t in (1 - i / steps for i in range(steps))] + [0.0]
