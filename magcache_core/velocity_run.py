"""A run on a plain transformer that predicts and corrects: every call answers with the velocity for an Euler step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from magcache_core.plan_data import VelocityStep


class VelocityRun:
    """What is ahead of one CFG branch's run, and the velocities at hand."""

    def __init__(self, steps: Sequence[VelocityStep], first: int) -> None:
        """
        Args:
            steps: from the run's step ``first`` on, which computes.
            first: index of the run's step that ``steps`` begins with.
        """
        self._steps = steps
        self._first = first
        self._known: deque[torch.Tensor] = deque(maxlen=max(len(step.move) for step in steps))  # newest first
        self._answer: Callable[[torch.Tensor], Any]

    def take(self, step: int, forward: Callable[[], Any]) -> Any:
        """The transformer's output for ``step``: ``forward`` runs where the schedule computes, and only there."""
        ahead = self._steps[step - self._first]
        if ahead.move:
            output = forward()
            self._known.appendleft(sample_of(output))
            kind = type(output)
            self._answer = (lambda velocity: (velocity,)) if kind is tuple else (lambda velocity: kind(sample=velocity))
        total = sum(weight * v.float() for weight, v in zip(ahead.velocity, self._known, strict=True))
        assert isinstance(total, torch.Tensor)
        return self._answer(total.to(self._known[0].dtype))


def sample_of(output: Any) -> torch.Tensor:
    """The velocity in a diffusers transformer's output."""
    sample: torch.Tensor = output[0] if isinstance(output, tuple) else output.sample
    return sample
