"""Stage vae: an autoencoder with 16 latent channels at an eighth of the resolution, smooth enough to generate in."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from . import loop, scenes

CROP, BATCH = 64, 16
# Noise on the latents while training makes the decoder forgive what the transformer gets slightly wrong.
LATENT_NOISE = 0.1
POLISH_NOISE = 0.05


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def draw_scenes(count: int, seed: int, *, held_out: bool = False) -> np.ndarray:
    """(count, 128, 128, 3) uint8."""
    rng = np.random.default_rng([loop.SEED, seed])
    images = np.empty((count, 128, 128, 3), np.uint8)
    for image in images:
        scene = scenes.sample(rng, held_out=held_out)
        image[:] = scenes.render(scene.background, scenes.place(scene, 128, 128, rng), 128, 128)
    return images


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(BATCH, CROP, CROP, 3): random windows, anywhere on the canvas."""
    picks = rng.integers(len(images), size=BATCH)
    corners = rng.integers(0, images.shape[1] - CROP + 1, size=(BATCH, 2))
    return np.stack([images[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(picks, corners, strict=True)])


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 for colours, MSE for what is plainly wrong, and the gradients' L1 for crisp edges."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges


def train(work: Path, budget: loop.Budget, device: torch.device) -> None:
    path = work / "vae.pt"
    torch.manual_seed(loop.SEED)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    average = loop.Average(model, 0.998)
    checkpoint = loop.Checkpoint(path, budget, model=model, optimizer=optimizer, average=average)
    checkpoint.resume(device)
    images = draw_scenes(4000 if budget.steps is None else 64, seed=1)
    rng = np.random.default_rng([loop.SEED, 2, budget.step])

    for step, bar in budget.run("vae", checkpoint.save):
        warm = min(1.0, (step + 1) / 100)
        loop.set_lr(optimizer, warm * loop.flat_then_linear(budget.fraction))
        target = to_tensor(crops(images, rng), device)
        with loop.autocast(device):
            latents = model.encode(target).latent_dist.mean  # (n, 16, 8, 8)
            output = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        loss = reconstruction_loss(output.float(), target) + 1e-3 * latents.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", step=step, refresh=False)
    average.copy_to(model)
    factors = measure(model, images[:256], device)
    model.register_to_config(shift_factor=factors["shift"], scaling_factor=factors["scale"])
    model.save_pretrained(work / "vae")
    unseen = draw_scenes(128 if budget.steps is None else 8, seed=3, held_out=True)
    print(f"vae: {budget.step} steps, {psnr(model, unseen, device):.2f} dB on unseen scenes, {factors}")


@torch.inference_mode()
def measure(model: AutoencoderKL, images: np.ndarray, device: torch.device) -> dict[str, float]:
    """The latents' mean and inverse deviation, which the pipeline uses to standardise them."""
    parts = [model.encode(to_tensor(images[i : i + 32], device)).latent_dist.mean for i in range(0, len(images), 32)]
    latents = torch.cat(parts)
    return {"shift": round(latents.mean().item(), 4), "scale": round(1 / latents.std().item(), 4)}


@torch.inference_mode()
def psnr(model: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Peak signal to noise of the round trip, averaged over the pictures."""
    values = []
    for i in range(0, len(images), 16):
        target = to_tensor(images[i : i + 16], device)
        output = model.decode(model.encode(target).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (output - target).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item() if values else math.nan


def load(work: Path, device: torch.device, name: str = "vae") -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / name, low_cpu_mem_usage=False).to(device).eval()
