"""How FLUX.1 and FLUX.2 represent images as tokens: noise, position ids, conversion to and from VAE latents.

Both pack two by two latents into one token. They differ in the shape in which noise is drawn, the axes of position ids,
the normalisation of latents, and the shift of the noise schedule with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from app.engine.geometry import Geometry

REFERENCE_INTERVAL = 10
"""FLUX.2 puts its i-th reference image at the time coordinate 10 i, counted from 1; the image itself is at 0."""


class Layout(Protocol):
    """The operations on tokens that the engine, the VAE and the source encoder need."""

    def noise(
        self, seed: int, geometry: Geometry, channels: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Starting noise, (image_tokens, channels), drawn on the CPU so that a seed means the same on any device."""

    def position_ids(self, geometry: Geometry, text_tokens: int, references: Sequence[Geometry] = ()) -> torch.Tensor:
        """Rotary position ids, (text_tokens + image_tokens + reference tokens, axes), float32."""

    def shift(self, scheduler: Any, image_tokens: int, steps: int) -> float:
        """How far the noise schedule moves towards noise (``mu``); ``scheduler`` is the scheduler's configuration."""

    def to_vae(self, vae: Any, tokens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """(rows, image_tokens, channels) tokens as the latents that ``vae`` decodes, (rows, c, height, width)."""

    def from_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents that ``vae`` encoded, (rows, c, height, width), as tokens, (rows, image_tokens, channels)."""


class Flux1Layout:
    """FLUX.1: ids (image, row, column), one scale and shift for all channels."""

    def noise(
        self, seed: int, geometry: Geometry, channels: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Layout.noise`; drawn in the shape of the latents and then packed."""
        shape = (1, channels // 4, 2 * geometry.rows, 2 * geometry.columns)
        return pack(_draw(seed, shape, device, dtype))[0]

    def position_ids(self, geometry: Geometry, text_tokens: int, references: Sequence[Geometry] = ()) -> torch.Tensor:
        """See `Layout.position_ids`; text is at the origin, a reference (Kontext takes one) in image 1."""
        images = [_grid(one, 3, image=index > 0) for index, one in enumerate((geometry, *references))]
        return torch.cat([torch.zeros(text_tokens, 3), *images])

    def shift(self, scheduler: Any, image_tokens: int, steps: int) -> float:
        """See `Layout.shift`; linear in the tokens, through the two points of the scheduler's configuration."""
        rise, run = (
            scheduler.max_shift - scheduler.base_shift,
            scheduler.max_image_seq_len - scheduler.base_image_seq_len,
        )
        shift: float = scheduler.base_shift + rise / run * (image_tokens - scheduler.base_image_seq_len)
        return shift

    def to_vae(self, vae: Any, tokens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """See `Layout.to_vae`."""
        scaled: torch.Tensor = unpack(tokens, geometry) / vae.config.scaling_factor + vae.config.shift_factor
        return scaled

    def from_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `Layout.from_vae`."""
        return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


class Flux2Layout:
    """FLUX.2: ids (time, row, column, text position), a mean and a variance per channel of a token."""

    def noise(
        self, seed: int, geometry: Geometry, channels: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Layout.noise`; drawn as packed channels x rows x columns."""
        drawn = _draw(seed, (channels, geometry.rows, geometry.columns), device, dtype)
        return drawn.flatten(1).T.contiguous()

    def position_ids(self, geometry: Geometry, text_tokens: int, references: Sequence[Geometry] = ()) -> torch.Tensor:
        """See `Layout.position_ids`; text runs along its own axis, references along time."""
        text = torch.zeros(text_tokens, 4)
        text[:, 3] = torch.arange(text_tokens)
        images = [_grid(one, 4, image=REFERENCE_INTERVAL * index) for index, one in enumerate((geometry, *references))]
        return torch.cat([text, *images])

    def shift(self, scheduler: Any, image_tokens: int, steps: int) -> float:
        """See `Layout.shift`; linear in the tokens at 10 and at 200 steps, and linear in the steps.

        Above 4300 tokens the second line holds for all. The numbers are FLUX.2's published fit.
        """
        at_200 = 0.00016927 * image_tokens + 0.45666666
        if image_tokens > 4300:
            return at_200
        at_10 = 8.73809524e-05 * image_tokens + 1.89833333
        return at_200 + (at_200 - at_10) * (steps - 200) / 190

    def to_vae(self, vae: Any, tokens: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """See `Layout.to_vae`."""
        mean, deviation = self._statistics(vae, tokens)
        return unpack(tokens * deviation + mean, geometry)

    def from_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `Layout.from_vae`."""
        mean, deviation = self._statistics(vae, latents)
        return (pack(latents) - mean) / deviation

    def _statistics(self, vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return vae.bn.running_mean.to(like), deviation.to(like)


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


def _draw(seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # On the CPU, as diffusers' pipelines do with a CPU generator: a seed gives the same image on every device.
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype).to(device)


def _grid(geometry: Geometry, axes: int, image: int) -> torch.Tensor:
    """Ids of an image's tokens, (image_tokens, axes): ``image``, row and column, then zeros."""
    ids = torch.zeros(geometry.rows, geometry.columns, axes)
    ids[..., 0] = image
    ids[..., 1] = torch.arange(geometry.rows)[:, None]
    ids[..., 2] = torch.arange(geometry.columns)[None, :]
    return ids.reshape(-1, axes)
