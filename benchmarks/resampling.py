"""How to serve a step count that wasn't calibrated: ``python -m benchmarks.resampling``.

Carries flux-tiny's 28-step curve to other step counts by nearest index and by interpolating the cumulative
log-magnitude over sigma, and compares both with the curve measured there, and the images of the threshold rule at
equal computed steps. Then, for several shares of computed steps, plans from the interpolated costs against evenly
spaced schedules, with residuals and with velocities.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from app.control.likeness import psnr
from benchmarks.pictures import Generator, draw_prompts
from magcache_core import (
    MagCacheConfig,
    Plan,
    Profile,
    apply_mag_cache,
    evenly_corrected,
    evenly_spaced,
    fill,
    load_profile,
    plan,
    remove_mag_cache,
    schedule,
)
from magcache_core.measure import recording
from magcache_core.residual_stats import StepStatistics

STEP_COUNTS = (10, 20, 50)
COMPUTED_SHARE = 0.4
PLANNED_SHARES = (0.25, 0.35, 0.5, 0.6)


def measured_curve(generator: Generator, steps: int) -> tuple[list[float], list[float]]:
    """The true curve at this step count, and the run's noise levels."""
    with recording(generator.transformer) as traces:
        generator(steps)
    residuals = traces["cond"].residuals
    statistics = StepStatistics()
    for i, residual in enumerate(residuals):
        statistics.add(residual, residuals[i - 1] if i else None)
    levels: list[float] = generator.pipe.scheduler.sigmas.tolist()
    return statistics.norm_ratios, levels


def with_budget(profile: Profile, steps: int, budget: int, **resampling: Any) -> MagCacheConfig:
    """The rule with the least threshold that computes at most ``budget`` steps."""
    for thousandths in range(1, 4000):
        config = profile.config(steps, threshold=thousandths / 1000, max_skip_steps=8, **resampling)
        if schedule(config).count("C") <= budget:
            break
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resampling", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--profile", default="flux-tiny", help="name or path")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resampling.json"))
    args = parser.parse_args()
    profile = load_profile(args.profile)
    generator = Generator(args.model, draw_prompts(args.prompts, held_out=True, seed=4))
    lines = []
    plans = []
    for steps in STEP_COUNTS:
        truth, sigmas = measured_curve(generator, steps)
        reference = generator(steps)

        def decibels(followed: MagCacheConfig | Plan, steps: int = steps, reference: torch.Tensor = reference) -> float:
            apply_mag_cache(generator.transformer, followed)
            images = generator(steps)
            remove_mag_cache(generator.transformer)
            return round(psnr(images, reference).mean().item(), 2)

        for method, options in {"nearest": {}, "sigma": {"resample": "sigma", "sigmas": sigmas}}.items():
            curve = profile.config(steps, **options).ratios
            error = sum(abs(math.log(a / b)) for a, b in zip(curve, truth, strict=True)) / steps
            config = with_budget(profile, steps, round(COMPUTED_SHARE * steps), **options)
            line = {
                "steps": steps,
                "resampling": method,
                "mean_abs_log_ratio_error": round(error, 5),
                "schedule": schedule(config),
                "computed": schedule(config).count("C"),
                "psnr": decibels(config),
            }
            lines.append(line)
            print(json.dumps(line), flush=True)
        for budget in (math.ceil(share * steps) for share in PLANNED_SHARES):
            compared = {
                "steps": steps,
                "computed": budget,
                "planned, fitted": decibels(plan(profile, steps, budget=budget, reuse="fitted")),
                "even, linear": decibels(fill(profile, evenly_spaced(steps, budget), "linear")),
                "planned, corrected": decibels(plan(profile, steps, budget=budget, reuse="corrected")),
                "even, corrected": decibels(fill(profile, evenly_corrected(steps, budget), "corrected")),
            }
            plans.append(compared)
            print(json.dumps(compared), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"model": args.model.name, "prompts": args.prompts, "lines": lines, "plans": plans}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
