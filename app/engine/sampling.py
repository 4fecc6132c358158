"""Flow matching as diffusers' FLUX pipelines sample it: the noise schedule of a checkpoint.

The sigmas come from the checkpoint's own scheduler class and configuration, dynamic shifting included; the Euler step
(Esser et al., arXiv 2403.03206) is taken for many rows at once by the engine.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from app.engine.families import family_of


class FlowMatchSampler:
    """The noise schedule of one checkpoint, by step count and image size."""

    def __init__(self, model: Path) -> None:
        """Read ``scheduler/scheduler_config.json`` below the folder ``model``."""
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        self.family = family_of(model)
        self._cached_sigmas = lru_cache(maxsize=256)(self._make_sigmas)

    @property
    def uncached_reason(self) -> str:
        """Why every step computes when there is no MagCache profile for the model."""
        return self.family.uncached_reason

    def sigmas(self, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
        """Sigmas from 1 down to 0, (steps + 1,), float32, on the CPU. The timestep of step i is ``1000 sigmas[i]``.

        ``image_tokens`` counts the image's own tokens; references don't move the schedule.
        """
        return self._cached_sigmas(num_inference_steps, image_tokens)

    def _make_sigmas(self, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
        config = self._scheduler.config
        spaced = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        if config.use_dynamic_shifting:
            scheduler.set_timesteps(
                sigmas=spaced, mu=self.family.layout.shift(config, image_tokens, num_inference_steps)
            )
        else:
            scheduler.set_timesteps(sigmas=spaced)
        sigmas: torch.Tensor = scheduler.sigmas.to("cpu", torch.float32)
        return sigmas


def mix_noise(source: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Image-to-image's start: ``source`` with noise at level ``sigma``, both (image_tokens, channels).

    ``sigma``, a scalar, is rounded to their dtype first, as diffusers' ``scale_noise`` does it.
    """
    level = sigma.to(source)
    return level * noise + (1.0 - level) * source
