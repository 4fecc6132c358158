"""Flow matching as diffusers' FluxPipeline samples it: sigmas, initial noise, position ids.

The sigmas come from the checkpoint's own scheduler class and configuration, dynamic shifting included; the Euler step
(Esser et al., arXiv 2403.03206) is taken for many rows at once by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

LATENT_PIXELS = 8
"""Pixels per latent side: the FLUX autoencoder halves the picture three times."""
TOKEN_PIXELS = 16
"""Pixels per image token side: two by two latents are packed into one token."""


@dataclass(frozen=True)
class Geometry:
    """Image tokens of a picture: ``rows`` x ``columns``, each standing for 16 x 16 pixels."""

    rows: int
    columns: int

    @classmethod
    def of(cls, width: int, height: int) -> Geometry:
        """The geometry of a picture of ``width`` x ``height`` pixels, both multiples of 16."""
        return cls(height // TOKEN_PIXELS, width // TOKEN_PIXELS)

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.rows * self.columns


class FlowMatchSampler:
    """The noise schedule of one checkpoint, by step count and picture size."""

    def __init__(self, model: Path) -> None:
        """Read ``scheduler/scheduler_config.json`` below the folder ``model``."""
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        self.sigmas = lru_cache(maxsize=256)(self._sigmas)

    def _sigmas(self, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
        """Sigmas from 1 down to 0, (steps + 1,), float32, on the CPU. The timestep of step i is ``1000 sigmas[i]``."""
        config = self._scheduler.config
        # FLUX shifts the schedule towards noise for larger pictures, linearly in the number of tokens.
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        shift = config.base_shift + slope * (image_tokens - config.base_image_seq_len)
        spaced = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        if config.use_dynamic_shifting:
            scheduler.set_timesteps(sigmas=spaced, mu=shift)
        else:
            scheduler.set_timesteps(sigmas=spaced)
        sigmas: torch.Tensor = scheduler.sigmas.to("cpu", torch.float32)
        return sigmas


def initial_noise(
    seed: int, geometry: Geometry, channels: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Packed starting noise, (image_tokens, channels), drawn on the CPU so that a seed means the same on any device.

    ``channels`` is the transformer's ``in_channels``: four times the latent channels.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, channels // 4, 2 * geometry.rows, 2 * geometry.columns)
    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return pack(noise)[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(rows, channels, height, width) latents -> (rows, height * width / 4, 4 * channels) tokens."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(rows, image_tokens, 4 * channels) tokens -> (rows, channels, height, width) latents."""
    count, _, packed = tokens.shape
    blocks = tokens.view(count, geometry.rows, geometry.columns, packed // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(count, packed // 4, 2 * geometry.rows, 2 * geometry.columns)


def position_ids(geometry: Geometry, text_tokens: int) -> torch.Tensor:
    """Rotary position ids, (text_tokens + image_tokens, 3): text at the origin, image tokens at (0, row, column)."""
    ids = torch.zeros(geometry.rows, geometry.columns, 3)
    ids[..., 1] = torch.arange(geometry.rows)[:, None]
    ids[..., 2] = torch.arange(geometry.columns)[None, :]
    return torch.cat([torch.zeros(text_tokens, 3), ids.reshape(-1, 3)])
