"""The VAE's decoder, compiled: apart for images of the usual size, and with symbolic sizes for all others.

As with the transformer's blocks (ADR 0005), so that no request waits for the compiler, whatever its size.
"""

from __future__ import annotations

from typing import Any

import torch

from app.engine.geometry import LATENT_PIXELS


@torch.inference_mode()
def compile_decoder(vae: Any, width: int, height: int, compiler: str = "inductor") -> None:
    """Compile the decoder of ``vae``, in place, by running it once for each of two kinds of code.

    To be called by the thread that decodes, since code holds for a thread's settings, such as its number of threads.
    Images above eight megapixels compile once more: torch counts their elements in 64 bits.

    Args:
        width, height: of the usual image, in pixels.
        compiler: torch.compile's backend.
    """
    usual = height // LATENT_PIXELS, width // LATENT_PIXELS
    fixed, symbolic = (
        torch.compile(vae.decoder.forward, fullgraph=True, dynamic=dynamic, backend=compiler)
        for dynamic in (False, True)
    )

    def forward(latents: torch.Tensor) -> torch.Tensor:
        """(1, channels, rows, columns) -> (1, 3, 8 rows, 8 columns)."""
        # In one layout, since code is compiled for a layout: a tile is a part of its image's latents.
        latents = latents.contiguous(memory_format=torch.channels_last)
        pixels: torch.Tensor = (fixed if latents.shape[-2:] == usual else symbolic)(latents)
        return pixels

    vae.decoder.forward = forward
    for sides in (usual, _other(*usual, vae.config.latent_channels)):
        vae.decoder(torch.zeros(1, vae.config.latent_channels, *sides, dtype=vae.dtype, device=vae.device))


def _other(rows: int, columns: int, channels: int) -> tuple[int, int]:
    """A size like rows x columns without equal numbers: what is equal when code is compiled is taken for always so."""
    sizes = ((rows + more, columns + wider) for more in (4, 8) for wider in (4, 8, 12))
    return next(sides for sides in sizes if len({*sides, channels}) == 3)
