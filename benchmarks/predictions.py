"""How well is the quality of a schedule predicted? ``python -m benchmarks.predictions``.

flux-tiny, held-out prompts, at 28 and 20 steps: plans for several numbers of computed steps, and the threshold
rule, are run and compared with the uncached images. The rank correlation with the measured PSNR is Spearman's, of the
profile's predicted error and of the PSNR that its trials let expect.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.control.likeness import psnr
from benchmarks.pictures import Generator, draw_prompts
from magcache_core import Plan, Profile, apply_mag_cache, choose, fewest_steps, load_profile, plan, remove_mag_cache
from magcache_core.expected import QualityScale

PROMPT_SEED = 43
SHARES = (0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65, 0.85)
THRESHOLDS = (0.06, 0.24)


def schedules(profile: Profile, steps: int) -> Iterator[tuple[str, Plan]]:
    """Plans that requests may get at ``steps`` steps, by how they came about."""
    fewest = fewest_steps(profile, steps)
    for budget in sorted({max(fewest, round(share * steps)) for share in SHARES}):
        yield "budget", choose(profile, steps, budget=budget)
        if steps == profile.steps:  # there a budget takes what was tried
            yield "planned", plan(profile, steps, budget=budget, reuse=profile.reuse)
    for threshold in THRESHOLDS:
        yield "threshold", choose(profile, steps, threshold=threshold)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[inverse]

    return round(float(np.corrcoef(ranks(a), ranks(b))[0, 1]), 3)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 20])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/predictions.json"))
    args = parser.parse_args()
    profile = load_profile("flux-tiny")
    scale = QualityScale(profile)
    generator = Generator(args.model, draw_prompts(args.prompts, held_out=True, seed=PROMPT_SEED))
    rows: list[dict[str, Any]] = []
    images: list[tuple[float, float, float]] = []  # predicted error, predicted and measured dB
    for steps in args.steps:
        reference = generator(steps)
        for kind, made in schedules(profile, steps):
            apply_mag_cache(generator.transformer, made)
            measured = psnr(generator(steps), reference)
            remove_mag_cache(generator.transformer)
            expected = scale.psnr_db(made)
            rows.append(
                {
                    "steps": steps,
                    "kind": kind,
                    "computed": made.computed,
                    "reuse": made.reuse,
                    "predicted_error": round(made.predicted_error, 4),
                    "predicted_db": None if expected is None else round(expected, 2),
                    "measured_db": round(measured.mean().item(), 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            if expected is not None:
                images += [(made.predicted_error, expected, figure) for figure in measured.tolist()]
    known = [row for row in rows if row["predicted_db"] is not None]
    away = np.array([row["predicted_db"] - row["measured_db"] for row in known])
    errors, decibels, figures = zip(*images, strict=True)
    measured_db = [row["measured_db"] for row in known]
    document = {
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
        "prompts": args.prompts,
        "schedules": len(rows),
        "known": len(known),
        "rank_correlation": {
            "predicted_psnr_db": rank_correlation([row["predicted_db"] for row in known], measured_db),
            "predicted_error": rank_correlation([-row["predicted_error"] for row in known], measured_db),
            "predicted_psnr_db_single_images": rank_correlation(decibels, figures),
            "predicted_error_single_images": rank_correlation([-error for error in errors], figures),
        },
        "too_high_by_db": {"mean": round(float(away.mean()), 2), "rms": round(float(np.sqrt((away**2).mean())), 2)},
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in document.items() if name != "rows"}))


if __name__ == "__main__":
    main()
