"""What the default settings cost in quality: ``python -m benchmarks.quality``.

flux-tiny at 28 steps, 64 held-out prompts: the service's default (and the authors' plain rule, for comparison) against
the uncached pictures. Exits with an error when the default skips less than 60 % of the steps, or falls below 62
dB on average or 55 in the worst tenth. Also draws uncached and cached pictures side by side for the README.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks.pictures import Generator, draw_prompts, score, to_pil
from magcache_core import (
    MagCacheConfig,
    Plan,
    apply_mag_cache,
    choose,
    load_profile,
    predicted_error,
    remove_mag_cache,
    schedule,
)

STEPS = 28
PROMPT_SEED = 3
LEAST_SKIPPED, LEAST_PSNR, LEAST_WORST = 0.6, 62.0, 55.0
COLUMNS = 6


def measure(generator: Generator, reference: torch.Tensor, source: MagCacheConfig | Plan) -> tuple[dict[str, Any], Any]:
    """Figures and pictures of one setting."""
    marks = source.schedule if isinstance(source, Plan) else schedule(source)
    apply_mag_cache(generator.transformer, source)
    started = time.perf_counter()
    images = generator(STEPS)
    seconds = time.perf_counter() - started
    remove_mag_cache(generator.transformer)
    error = source.predicted_error if isinstance(source, Plan) else predicted_error(source)
    figures = {
        "schedule": marks,
        "reuse": source.reuse if isinstance(source, Plan) else "residual",
        "computed": marks.count("C"),
        "skipped_share": round(marks.count(".") / len(marks), 4),
        "predicted_error": round(error, 4),
        "seconds": round(seconds, 2),
    }
    return figures | score(images, reference, generator.prompts.scenes), images


def side_by_side(reference: torch.Tensor, cached: torch.Tensor, computed: int) -> Image.Image:
    """Two rows: every step computed, and with the cache."""
    size, margin, label = reference.shape[-1], 4, 16
    width = COLUMNS * (size + margin) + margin
    sheet = Image.new("RGB", (width, 2 * (size + label + margin) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    rows = ((f"uncached: {STEPS} of {STEPS} steps computed", reference), (f"MagCache: {computed} of {STEPS}", cached))
    for row, (text, images) in enumerate(rows):
        top = margin + row * (size + label + margin)
        pen.text((margin, top + 1), text, fill="black")
        for column in range(COLUMNS):
            sheet.paste(to_pil(images[column]), (margin + column * (size + margin), top + label))
    return sheet


def main() -> int:
    """The command line; 1 when the default settings miss the bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--profile", default="flux-tiny", help="name or path")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/magcache-side-by-side.png"))
    args = parser.parse_args()
    profile = load_profile(args.profile)
    generator = Generator(args.model, draw_prompts(args.prompts, held_out=True, seed=PROMPT_SEED))
    started = time.perf_counter()
    reference = generator(STEPS)
    uncached = {"seconds": round(time.perf_counter() - started, 2)} | score(
        reference, reference, generator.prompts.scenes
    )
    default, images = measure(generator, reference, choose(profile, STEPS))
    threshold, _ = measure(generator, reference, profile.config(STEPS))
    document = {
        "model": args.model.name,
        "profile": profile.name,
        "prompts": args.prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
        "uncached": uncached,
        "default": default,
        "threshold rule": threshold,
    }
    for path in (args.out, args.picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    side_by_side(reference, images, default["computed"]).save(args.picture)
    for name in ("uncached", "default", "threshold rule"):
        print(name, json.dumps(document[name]))
    close = default["psnr"] >= LEAST_PSNR and default["psnr_worst_decile"] >= LEAST_WORST
    passed = default["skipped_share"] >= LEAST_SKIPPED and close
    print(
        f"{'passed' if passed else 'FAILED'}: {default['skipped_share']:.0%} skipped, {default['psnr']:.2f} dB, "
        f"worst tenth {default['psnr_worst_decile']:.2f} dB "
        f"(bar: {LEAST_SKIPPED:.0%} at {LEAST_PSNR:g} and {LEAST_WORST:g} dB)"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
