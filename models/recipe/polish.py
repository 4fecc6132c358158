"""Stage polish: the decoder alone, for longer. The encoder is frozen, so the transformer's latents stay valid."""

from pathlib import Path

import numpy as np
import torch

from . import loop, vae


def train(work: Path, budget: loop.Budget, device: torch.device) -> None:
    path = work / "polish.pt"
    torch.manual_seed(loop.SEED + 4)
    model = vae.load(work, device).requires_grad_(False)
    decoder = model.decoder.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1.5e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    average = loop.Average(decoder, 0.998)
    checkpoint = loop.Checkpoint(path, budget, decoder=decoder, optimizer=optimizer, average=average)
    checkpoint.resume(device)
    images = vae.draw_scenes(64 if budget.steps else 3000, seed=5)
    rng = np.random.default_rng([loop.SEED, 6, budget.step])

    for step, bar in budget.run("polish", checkpoint.save):
        loop.set_lr(optimizer, min(1.0, (step + 1) / 50) * loop.flat_then_linear(budget.fraction))
        target = vae.to_tensor(vae.crops(images, rng), device)
        with loop.autocast(device):
            with torch.no_grad():
                latents = model.encode(target).latent_dist.mean
            output = model.decode(latents + vae.POLISH_NOISE * torch.randn_like(latents)).sample
        loss = vae.reconstruction_loss(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", step=step, refresh=False)
    average.copy_to(decoder)
    model.eval().save_pretrained(work / "vae-polished")
    unseen = vae.draw_scenes(8 if budget.steps else 128, seed=3, held_out=True)
    print(f"polish: {budget.step} steps, {vae.psnr(model, unseen, device):.2f} dB on unseen scenes")
