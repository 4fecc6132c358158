"""What fp8 weights cost in quality: ``python -m benchmarks.quantization``.

flux-tiny at 28 steps, held-out prompts, against its pictures in float32: weights rounded to bfloat16, for comparison,
then fp8 for the linears that tensor parallelism shards, with every step computed and with the default MagCache.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

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


def measure(generator: Generator, reference: torch.Tensor) -> dict[str, Any]:
    """Figures of the generator's transformer as it is, without and with the cache."""
    figures: dict[str, Any] = {"weight_bytes": weight_bytes(generator.transformer)}
    figures["uncached"] = score(generator(STEPS), reference, generator.prompts.scenes)
    apply_mag_cache(generator.transformer, choose(load_profile("flux-tiny"), STEPS))
    figures["magcache"] = score(generator(STEPS), reference, generator.prompts.scenes)
    remove_mag_cache(generator.transformer)
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantization.json"))
    args = parser.parse_args()
    generator = Generator(args.model, draw_prompts(args.prompts, held_out=True, seed=PROMPT_SEED))
    reference = generator(STEPS)
    document: dict[str, Any] = {
        "model": args.model.name,
        "prompts": args.prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        "float32": measure(generator, reference),
    }
    # The publishers' own rounding is what fp8 has to be seen beside.
    exact = {name: value.clone() for name, value in generator.transformer.state_dict().items()}
    for parameter in generator.transformer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    document["weights rounded to bfloat16"] = measure(generator, reference)
    generator.transformer.load_state_dict(exact)
    for _, linear in planned_linears(generator.transformer):
        quantize(linear)
    document["fp8"] = measure(generator, reference)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
