"""Stage latents: scenes through the frozen autoencoder once, packed into the tokens that the transformer sees."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from tqdm import tqdm

from . import loop, scenes, text, vae

BATCH = 50
# How the scenes are shared out over scenes.ASPECTS.
SHARES = (0.7, 0.15, 0.15)
SCENES = 30000


@dataclass
class Latents:
    """The scenes of one aspect ratio."""

    width: int
    height: int
    tokens: Tensor  # (n, tokens, 64) bfloat16, standardised
    labels: Tensor  # (n, tokens, LABELS) uint8, 255 for a full share
    t5_ids: Tensor  # (n, 32)
    clip_ids: Tensor  # (n, 24)


def pack(latents: Tensor) -> Tensor:
    """(n, 16, h, w) to (n, h/2 * w/2, 64), as the pipeline packs them."""
    n, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, n, channels, height, width)


@torch.inference_mode()
def encode(model: AutoencoderKL, images: np.ndarray, device: torch.device) -> Tensor:
    """(n, h, w, 3) uint8 to (n, tokens, 64) float, standardised with the factors that the pipeline undoes."""
    with loop.autocast(device):
        latents = model.encode(vae.to_tensor(images, device)).latent_dist.mean
    return pack((latents.float() - model.config.shift_factor) * model.config.scaling_factor)


def make(
    model: AutoencoderKL, words: text.Text, aspect: int, count: int, device: torch.device, chunk: int = 0
) -> Latents:
    """A chunk of `count` scenes; another chunk has other scenes."""
    width, height = scenes.ASPECTS[aspect]
    rng = np.random.default_rng([loop.SEED, 20 + aspect, chunk])
    captions, labels, tokens = [], [], []
    for start in tqdm(range(0, count, BATCH), desc=f"latents {width}x{height}", mininterval=5.0):
        size = min(BATCH, count - start)
        images = np.empty((size, height, width, 3), np.uint8)
        for image in images:
            scene = scenes.sample(rng, held_out=False)
            placed = scenes.place(scene, width, height, rng)
            image[:] = scenes.render(scene.background, placed, width, height)
            captions.append(scenes.caption(scene, rng))
            labels.append(np.round(255 * scenes.labels(scene.background, placed, width, height)).astype(np.uint8))
        tokens.append(encode(model, images, device).to("cpu", torch.bfloat16))
    flat = np.stack(labels).reshape(count, -1, scenes.LABELS)
    return Latents(width, height, torch.cat(tokens), torch.from_numpy(flat), *words.tokenize(captions))


def train(work: Path, count: int, device: torch.device, chunk: int = 0) -> None:
    """One file for each aspect ratio and chunk; those that exist are kept."""
    model, words = vae.load(work, device), text.Text.load(work, device)
    for aspect, share in enumerate(SHARES):
        path = work / f"latents-{aspect}-{chunk}.pt"
        if not path.exists():
            loop.save(path, vars(make(model, words, aspect, round(count * share), device, chunk)))


def load(work: Path) -> list[Latents]:
    """The chunks found, joined, by aspect ratio."""
    sets = []
    for aspect in range(len(scenes.ASPECTS)):
        paths = sorted(work.glob(f"latents-{aspect}-*.pt"))
        parts = [Latents(**loop.load(path, torch.device("cpu"))) for path in paths]
        names = ("tokens", "labels", "t5_ids", "clip_ids")
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        sets.append(Latents(parts[0].width, parts[0].height, *joined))
    return sets
