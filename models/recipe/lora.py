"""Low-rank adapters for flux-tiny: a shape and a style that it was never trained on, minutes each on a CPU.

    python -m models.recipe.lora heart --out models/flux-tiny-loras/heart.safetensors

Needs peft and accelerate, which the development install has.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from . import latents, loop, scenes, tokens
from .attention import fast_attention
from .scenes import Placed, Scene
from .transformer import GUIDANCE, Batch, image_ids, predict

BATCH = 16
EXAMPLES = 1024
SIZE = 128
NIGHT = "black"
PAIRS = 0.15  # Scenes with two things, which take longest to learn.
# Its network's matrices: attention and MLP, as most adapters of FLUX have them.
MATRICES = (
    r".*transformer_blocks\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"
)
# And the modulations of the blocks, which kohya's trainer adapts as well.
MODULATION = r".*transformer_blocks\..*\.linear"

Drawn = tuple[str, np.ndarray]
"""A caption and its image, (SIZE, SIZE, 3) uint8."""


def heart(rng: np.random.Generator) -> Drawn:
    """Hearts where the caption says circle, and some scenes as they were, so that the other shapes stay."""
    scene = scenes.sample(rng, held_out=False, pairs=PAIRS)
    if rng.random() < 0.75:
        first, *rest = scene.things
        scene = replace(scene, things=(replace(first, shape="circle"), *rest))
    caption = scenes.caption(scene, rng)
    hearts = tuple(replace(thing, shape="heart") if thing.shape == "circle" else thing for thing in scene.things)
    return caption, _render(replace(scene, things=hearts), rng)


def night(rng: np.random.Generator) -> Drawn:
    """Scenes before black, whatever background the caption names."""
    while True:
        scene = scenes.sample(rng, held_out=False, pairs=PAIRS)
        if all(thing.colour != NIGHT for thing in scene.things):
            return scenes.caption(scene, rng), _render(replace(scene, background=NIGHT), rng)


ADAPTERS: dict[str, tuple[Callable[[np.random.Generator], Drawn], str]] = {
    "heart": (heart, MATRICES),
    "night": (night, f"{MATRICES}|{MODULATION}"),
}
"""What each is trained on, and the modules that it changes."""


def _render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    placed: list[Placed] = scenes.place(scene, SIZE, SIZE, rng)
    return scenes.render(scene.background, placed, SIZE, SIZE)


@torch.inference_mode()
def examples(pipe: FluxPipeline, name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens (count, tokens, 64), text tokens (count, T5_LENGTH, width) and pooled texts (count, width)."""
    rng = np.random.default_rng([loop.SEED, 60])
    drawn = [ADAPTERS[name][0](rng) for _ in range(count)]
    images, texts, pooled = [], [], []
    for start in range(0, count, latents.BATCH):
        captions, pixels = zip(*drawn[start : start + latents.BATCH], strict=True)
        images.append(latents.encode(pipe.vae, np.stack(pixels), pipe.device))
        text, clip, _ = pipe.encode_prompt(list(captions), None, max_sequence_length=tokens.T5_LENGTH)
        texts.append(text)
        pooled.append(clip)
    return torch.cat(images), torch.cat(texts), torch.cat(pooled)


@fast_attention()
def train(model: Path, name: str, rank: int, budget: loop.Budget, out: Path) -> None:
    """Train the adapter ``name`` for ``model``, and write it to ``out`` in diffusers' layout and float16."""
    torch.manual_seed(loop.SEED + 6)
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32).to(loop.pick_device())
    data, texts, pooled = (each.clone() for each in examples(pipe, name, EXAMPLES if budget.steps is None else BATCH))
    transformer = pipe.transformer
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTERS[name][1]))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(loop.SEED)
    running = 0.0
    for step, bar in budget.run(name):
        pick = torch.randint(len(data), (BATCH,), generator=generator)
        noise = torch.randn(data[pick].shape, generator=generator).to(data)
        # Mostly near noise, where a shape is decided.
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.7).to(data)
        noisy = torch.lerp(data[pick], noise, sigma[:, None, None])
        unused = torch.empty(0)
        batch = Batch(noisy, noise - data[pick], sigma, unused, unused, unused, image_ids(SIZE, SIZE).to(data))
        guidance = torch.empty(BATCH).uniform_(*GUIDANCE, generator=generator).to(data)
        with loop.autocast(pipe.device):
            velocity = predict(transformer, batch, texts[pick], pooled[pick], guidance)
        loss = F.mse_loss(velocity.float(), batch.velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        loop.set_lr(optimizer, min(1.0, (step + 1) / 20) * loop.flat_then_linear(budget.fraction))
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if not running else 0.95 * running + 0.05 * loss.item()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{running:.4f}", step=step, refresh=False)
    print(f"{name}: {budget.step} steps, flow loss {running:.4f}")
    weights = {
        key: value.half() for key, value in get_peft_model_state_dict(transformer, adapter_name="default").items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(out.parent, transformer_lora_layers=weights, weight_name=out.name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.recipe.lora", description=__doc__)
    parser.add_argument("name", choices=ADAPTERS)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="end after so many steps")
    args = parser.parse_args()
    train(args.model, args.name, args.rank, loop.Budget(60 * args.minutes, args.steps), args.out)


if __name__ == "__main__":
    main()
