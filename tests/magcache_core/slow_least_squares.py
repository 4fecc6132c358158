"""Least squares over velocities written out: with vectors that have the inner products, step by step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from magcache_core.plan_data import Products


def vectors(steps: int) -> np.ndarray:
    """Smooth velocities with some noise, (places, steps)."""
    rng = np.random.default_rng(0)
    at = np.linspace(0, 1, steps)
    curves = np.stack([at**power for power in range(6)]) * 3.0 ** -np.arange(6)[:, None]
    return rng.normal(size=(40, 6)) @ curves + 0.02 * rng.normal(size=(40, steps))


def products(steps: int) -> Products:
    """The inner products of `vectors`."""
    found = vectors(steps)
    return tuple(map(tuple, (found.T @ found).tolist()))


class SlowLeastSquares:
    """One run, step by step: `slow_corrector.SlowRun` with the velocities of `vectors` to fit."""

    def __init__(self, sigmas: list[float], schedule: str) -> None:
        self.sigmas = sigmas
        self.schedule = schedule
        self.step = 0
        self.estimates: list[torch.Tensor] = []
        self._vectors = vectors(len(schedule))
        self._computed: list[tuple[int, torch.Tensor]] = []  # newest first
        self._moved = np.zeros(len(self._vectors))  # where the moves so far lead the vectors
        self._end = torch.zeros(0)  # the latents at the next computed step

    def advance(self, latents: torch.Tensor, velocity: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The latents after the next step, in double precision."""
        step, latents = self.step, latents.double()
        following = self.schedule.find("C", step + 1)
        end = len(self.schedule) if following < 0 else following
        if self.schedule[step] == "C":
            self._computed = [(step, velocity().double()), *self._computed][:4]
            uncached = sum(self._delta(q) * self._vectors[:, q] for q in range(end))
            weights = self._fit(uncached - self._moved)
            self._moved = self._moved + self._vectors[:, [q for q, _ in self._computed]] @ weights
            self._end = latents + self._weighed(weights)
        here = self._end - self._rest(step, end)
        self.estimates.append(here - self.sigmas[step] * self._weighed(self._fit(self._vectors[:, step])))
        self.step += 1
        return self._end - self._rest(step + 1, end)

    def _delta(self, step: int) -> float:
        return self.sigmas[step + 1] - self.sigmas[step]

    def _fit(self, target: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(self._vectors[:, [q for q, _ in self._computed]], target, rcond=None)[0]

    def _weighed(self, weights: np.ndarray) -> torch.Tensor:
        return sum(weight * value for weight, (_, value) in zip(weights.tolist(), self._computed, strict=True))

    def _rest(self, step: int, end: int) -> torch.Tensor:
        """What the steps from ``step`` on move the latents up to ``end``."""
        fits = (self._delta(q) * self._weighed(self._fit(self._vectors[:, q])) for q in range(step, end))
        return sum(fits, torch.zeros_like(self._end))
