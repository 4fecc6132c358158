"""Would trials keep weights by least squares? ``python -m benchmarks.corrector_trials``.

The search of `magcache_core.trials`, from scratch, once with each way to weigh velocities: polynomials (`corrected`)
and least squares over the last four, with calibration's inner products. As in a calibration, schedules are tried on the
prompts of flux-tiny's, and the closest three are judged on held-out ones. What is kept is then measured on further
prompts, which nothing else used: do least squares win where the judge says so? Results are kept as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from app.control.likeness import psnr
from benchmarks.corrector_variants import least_squares, moved
from benchmarks.correctors import PROMPT_SEED, STEPS, Loop, Sampler, corrected, euler
from benchmarks.pictures import Generator, Prompts, draw_prompts
from magcache_core import Profile, load_profile
from magcache_core.costs import CostTable
from magcache_core.plan_data import Plan, Trial
from magcache_core.trials import as_served, distances, finalists, mean_error, search

KEPT = 4
JUDGE_SEED = 41
PROMPTS = Path("benchmarks/flux-tiny-prompts.txt")

Weighing = Callable[[str], Sampler]
"""How a schedule's computed velocities move the latents."""


class Images:
    """The images of one set of prompts, and how far those of a sampler are from the uncached ones."""

    def __init__(self, model: Path, prompts: Prompts) -> None:
        self.loop = Loop(Generator(model, prompts))
        self._uncached = self.loop.images(euler(self.loop.sigmas(STEPS)))

    def error(self, sampler: Sampler) -> float:
        """The error of a `Trial`."""
        return mean_error(distances(as_served(self.loop.images(sampler)), as_served(self._uncached)))

    def decibels(self, sampler: Sampler) -> list[float]:
        """PSNR against the uncached images, mean and mean of the worst tenth."""
        values = psnr(self.loop.images(sampler), self._uncached).sort().values
        return [round(part.mean().item(), 2) for part in (values, values[: max(1, len(values) // 10)])]


def weighings(table: CostTable, sigmas: Sequence[float]) -> dict[str, Weighing]:
    """By name, both ways to weigh velocities."""
    gram = table.velocities
    assert gram is not None
    return {
        "corrected": lambda marks: corrected(marks, sigmas, "corrected"),
        f"least squares of {KEPT}": lambda marks: moved(marks, sigmas, least_squares(marks, sigmas, gram, KEPT)),
    }


def tried(profile: Profile, error_of: Callable[[Plan], float], moves: int, budgets: Sequence[int]) -> list[Trial]:
    """All that the search of trials runs; candidates that reuse residuals are passed over."""
    found: list[Trial] = []
    trying = search(replace(profile, trials=()), moves, budgets)
    candidate = next(trying)
    while True:
        error = error_of(candidate) if candidate.reuse == "corrected" else math.inf
        found.append(Trial(candidate.schedule, candidate.reuse, error))
        try:
            candidate = trying.send(error)
        except StopIteration:
            return found


def run(
    model: Path, profile: Profile, out: Path, budgets: Sequence[int], moves: int, judges: int, prompts: int
) -> None:
    """Search, judge and measure each number of computed steps by each weighing."""
    table = profile.branch().costs
    if table is None or table.velocities is None:
        raise SystemExit(f"profile {profile.name} has no inner products of velocities: it needs a calibration")
    chosen_on = Images(model, Prompts(tuple(PROMPTS.read_text().splitlines()), ()))
    judged_on = Images(model, draw_prompts(judges, held_out=True, seed=JUDGE_SEED))
    measured_on = Images(model, draw_prompts(prompts, held_out=True, seed=PROMPT_SEED))
    lines = []
    for name, weigh in weighings(table, chosen_on.loop.sigmas(STEPS)).items():
        found = tried(profile, lambda plan, weigh=weigh: chosen_on.error(weigh(plan.schedule)), moves, budgets)
        for budget in budgets:
            best = finalists(found, budget)
            judged = {trial.schedule: judged_on.error(weigh(trial.schedule)) for trial in best}
            kept = min(judged, key=judged.__getitem__)
            line = {
                "computed": budget,
                "weighing": name,
                "schedule": kept,
                "chosen": round(-20 * math.log10(best[0].error), 2),
                "judged": round(-20 * math.log10(judged[kept]), 2),
                "measured": measured_on.decibels(weigh(kept)),
            }
            lines.append(line)
            print(json.dumps(line), flush=True)
            out.write_text(
                json.dumps({"moves": moves, "judges": judges, "prompts": prompts, "lines": lines}, indent=1) + "\n"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corrector_trials", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--profile", default="flux-tiny", help="name or path")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/corrector_trials.json"))
    parser.add_argument("--budgets", type=int, nargs="+", default=[6, 8, 10])
    parser.add_argument("--moves", type=int, default=12)
    parser.add_argument("--judges", type=int, default=16, help="held-out prompts that the closest three are judged on")
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    profile = load_profile(args.profile)
    run(args.model, profile, args.out, args.budgets, args.moves, args.judges, args.prompts)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
