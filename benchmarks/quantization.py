"""What fp8 weights cost in quality: ``python -m benchmarks.quantization``.

flux-tiny at 28 steps, held-out prompts: fp8 for the linears that tensor parallelism splits against float32, with every
step computed and with the service's default MagCache. flux-tiny's weights are published in bfloat16, like the large
models', so that what is measured is the step from there to fp8.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from app.engine.fp8 import quantize
from app.engine.parallel import planned_linears
from benchmarks.pictures import Generator, draw_prompts, score
from magcache_core import apply_mag_cache, choose, load_profile, remove_mag_cache

STEPS = 28
PROMPT_SEED = 3


def weight_bytes(transformer: torch.nn.Module) -> int:
    """Memory of all parameters and of the scales beside them."""
    return sum(tensor.nbytes for tensor in (*transformer.parameters(), *transformer.buffers()))


def with_cache(generator: Generator) -> torch.Tensor:
    """Images with the service's default MagCache."""
    apply_mag_cache(generator.transformer, choose(load_profile("flux-tiny"), STEPS))
    images = generator(STEPS)
    remove_mag_cache(generator.transformer)
    return images


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantization.json"))
    args = parser.parse_args()
    generator = Generator(args.model, draw_prompts(args.prompts, held_out=True, seed=PROMPT_SEED))
    reference = generator(STEPS)
    images = {"float32, MagCache": with_cache(generator)}
    float32_bytes = weight_bytes(generator.transformer)
    for _, linear in planned_linears(generator.transformer):
        quantize(linear)
    images |= {"fp8": generator(STEPS), "fp8, MagCache": with_cache(generator)}
    document = {
        "model": args.model.name,
        "prompts": args.prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        "weight_bytes": {"float32": float32_bytes, "fp8": weight_bytes(generator.transformer)},
        "float32": score(reference, reference, generator.prompts.scenes),
        **{name: score(images, reference, generator.prompts.scenes) for name, images in images.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
