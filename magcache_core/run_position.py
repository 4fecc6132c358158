"""Where in a denoising run a transformer's forward call stands: step, number of steps, noise level."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Position:
    """One call's place in its run.

    Attributes:
        step: index of the denoising step, from 0.
        steps: number of steps of the run.
        sigma: noise level, or a value proportional to it; None when not known.
        timestep: the call's own ``timestep`` argument; None when it wasn't needed.
        restart: a new run begins here although the step index doesn't show it.
        levels: noise levels of the run's steps and the final one; empty when not known.
    """

    step: int
    steps: int
    sigma: float | None = None
    timestep: float | None = None
    restart: bool = False
    levels: tuple[float, ...] = ()


class Progress(Protocol):
    """The state of a run that `locate` reads and updates."""

    next_step: int
    last_timestep: float | None


def locate(
    transformer: nn.Module, context: Any, arguments: Mapping[str, Any], progress: Progress, default_steps: int
) -> Position:
    """Find the position of a call, from the best source at hand.

    1. the ``cache_context``, when it says ``step_index`` and ``num_inference_steps``;
    2. the scheduler of the pipeline that is calling, read on the host (its step index and sigmas: no GPU sync);
    3. counting calls, with a rising ``timestep`` as the sign of a new run.

    Args:
        transformer: the model that is called.
        context: diffusers' ``CacheContext``.
        arguments: the call's arguments by name.
        progress: this branch's run so far.
        default_steps: steps of a run where nothing says.
    """
    if context.step_index is not None and context.num_inference_steps is not None:
        sigma = context.sigma if context.sigma is not None else _first(context.timestep)
        return Position(context.step_index, context.num_inference_steps, sigma)
    scheduler = _calling_scheduler(transformer)
    if scheduler is not None:
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        steps = len(scheduler.timesteps)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            return Position(step, steps)
        levels = tuple(float(sigma) for sigma in sigmas)
        return Position(step, steps, levels[step], levels=levels)
    timestep = _first(arguments.get("timestep"))
    last = progress.last_timestep
    progress.last_timestep = timestep
    if timestep is None or last is None:
        return Position(progress.next_step, default_steps, timestep, timestep)
    if timestep >= last:
        return Position(0, default_steps, timestep, timestep, restart=True)
    return Position(progress.next_step, default_steps, timestep, timestep)


def _first(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value.flatten()[0])
    return None if value is None else float(value)


def _calling_scheduler(transformer: nn.Module) -> Any:
    """The scheduler of the pipeline whose call is under way.

    Diffusers' pipelines know their step and step count but don't pass them on (as of 0.42 they set a context's name
    only), so look for the pipeline itself among the callers.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        scheduler = getattr(owner, "scheduler", None) if owner is not None else None
        if scheduler is not None and hasattr(scheduler, "step_index"):
            denoiser = getattr(owner, "transformer", None)
            if getattr(denoiser, "_orig_mod", denoiser) is transformer:
                return scheduler
        frame = frame.f_back
    return None
