"""The models beside the transformer on a GPU: the VAE's decoder and the T5 encoder, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from app.components.compiled_vae import compile_decoder
from benchmarks.checkpoints.geometry import Part
from benchmarks.gpu_runs import random_model
from benchmarks.roofline import best_seconds, synchronize

REPEATS = 5


@torch.inference_mode()
def decode(
    part: Part,
    *,
    side: int,
    device: torch.device,
    dtype: torch.dtype,
    compiler: str,
    compiled_for: int | None = None,
    tiled: bool = False,
) -> dict[str, Any]:
    """Decode latents of ``side`` x ``side`` as the service does, whose weights lie with the channels last.

    With ``compiled_for`` the decoder is compiled, and images of that many latents a side are the usual ones.
    """
    vae = random_model(part, device, dtype).to(memory_format=torch.channels_last)
    if tiled:
        vae.enable_tiling()
    if compiled_for is not None:
        torch._dynamo.reset()  # code of the variant before would serve
        compile_decoder(vae, 8 * compiled_for, 8 * compiled_for, compiler)
    latents = torch.randn(1, vae.config.latent_channels, side, side, device=device, dtype=dtype)
    latents = latents.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = best_seconds(lambda: vae.decode(latents, return_dict=False), device, REPEATS)
    memory = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
    return {"seconds": seconds, "pixels": 8 * side} | memory


@torch.inference_mode()
def encode(part: Part, prompts: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Encode ``prompts`` prompts of ``tokens`` tokens together."""
    encoder = random_model(part, device, dtype)
    ids = torch.randint(0, encoder.config.vocab_size, (prompts, tokens), device=device)
    synchronize(device)
    seconds = best_seconds(lambda: encoder(ids), device, REPEATS)
    return {"seconds": seconds, "seconds_per_prompt": seconds / prompts, "tokens": tokens}
