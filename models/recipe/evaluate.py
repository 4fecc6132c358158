"""Stage evaluate: held-out captions through the exported folder in plain diffusers, judged by the checker."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm

from . import checker, loop, scenes, tokens

CAPTIONS, STEPS, BATCH = 200, 28, 25


def captions(count: int, seed: int = 40) -> list[tuple[scenes.Scene, str]]:
    """Held-out scenes in their own words."""
    rng = np.random.default_rng([loop.SEED, seed])
    drawn = [scenes.sample(rng, held_out=True, pairs=0.6) for _ in range(count)]
    return [(scene, scenes.caption(scene, rng)) for scene in drawn]


def load(folder: Path, device: torch.device) -> FluxPipeline:
    """In the dtype that was exported, where the device multiplies it."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=loop.dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    prompts: list[str],
    *,
    steps: int = STEPS,
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    guidance: float = 3.5,
    true_cfg: float = 1.0,
) -> list[Image.Image]:
    """One picture for each prompt, each from a seed of its own."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="evaluate", mininterval=5.0):
        part = prompts[start : start + BATCH]
        negative = {"negative_prompt": [""] * len(part), "true_cfg_scale": true_cfg} if true_cfg > 1 else {}
        images += pipe(
            part,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=tokens.T5_LENGTH,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            **negative,
        ).images
    return images


def judge(images: list[Image.Image], truth: list[scenes.Scene]) -> dict[str, float]:
    """Shares in [0, 1]: of pictures for the background, of objects for colours and shapes, and by number of objects."""
    verdicts = [checker.check(image, scene) for image, scene in zip(images, truth, strict=True)]
    figures = {
        "pictures": float(len(verdicts)),
        "background": float(np.mean([verdict.background for verdict in verdicts])),
        "colour_and_half": float(np.mean([ok for verdict in verdicts for ok in verdict.colours])),
        "shape": float(np.mean([ok for verdict in verdicts for ok in verdict.shapes])),
        "everything": float(np.mean([verdict.perfect for verdict in verdicts])),
    }
    for count, name in ((1, "one"), (2, "two")):
        some = [verdict for verdict, scene in zip(verdicts, truth, strict=True) if len(scene.things) == count]
        if some:
            figures[f"pictures_all_colours_{name}"] = float(np.mean([all(verdict.colours) for verdict in some]))
            figures[f"pictures_all_shapes_{name}"] = float(np.mean([all(verdict.shapes) for verdict in some]))
    return {name: round(value, 4) for name, value in figures.items()}


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """The pictures side by side, three pixels apart."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 3) - 3, rows * (height + 3) - 3), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + 3), index // columns * (height + 3)))
    return sheet


def evaluate(folder: Path, device: torch.device, count: int = CAPTIONS, steps: int = STEPS) -> None:
    """Every figure of the model card, printed and kept beside the weights."""
    pipe = load(folder, device)
    pairs = captions(count)
    truth, prompts = [scene for scene, _ in pairs], [prompt for _, prompt in pairs]
    figures = {}
    for width, height in scenes.ASPECTS:
        share = count if width == height else max(4, count // 4)
        images = generate(pipe, prompts[:share], steps=steps, size=(width, height))
        figures[f"{width}x{height}"] = judge(images, truth[:share])
        print(f"evaluate {width}x{height}: {figures[f'{width}x{height}']}")
        if width == height:
            grid(images[:32], 8).save(folder / "grid.png")
    record = {"steps": steps, "guidance_scale": 3.5, **figures}
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
