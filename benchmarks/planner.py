"""Which schedule and which reuse are best at equal computed steps: ``python -m benchmarks.planner``.

On flux-tiny, 28 steps, held-out prompts: the threshold rule's, the planned and evenly spaced schedules, each with every
reuse mode, against diffusers' TaylorSeer at as many computed steps and against simply running as many steps. Results
are kept as JSON after every line, so that an interrupted run goes on where it was; ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import TaylorSeerCacheConfig

from benchmarks.pictures import Generator, draw_prompts, score
from magcache_core import (
    ConfigError,
    MagCacheConfig,
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

STEPS = 28
BUDGETS = (6, 7, 9, 11, 14)
PROMPT_SEED = 2
LONGEST = 8
"""Most reused steps in a row where a plan knows ratios only: the least that all budgets allow with some room."""


@dataclass(frozen=True)
class Case:
    """One line of the table: how the transformer is prepared for the run, and how it is put back."""

    budget: int
    method: str
    reuse: str
    steps: int
    schedule: str
    prepare: Callable[[Any], None]
    restore: Callable[[Any], None]

    @property
    def key(self) -> tuple[int, str, str]:
        """What identifies the line."""
        return self.budget, self.method, self.reuse


def cases(profile: Profile, budgets: tuple[int, ...]) -> Iterator[Case]:
    """All lines of the table, the ones that are compared most first."""
    for budget in budgets:
        yield cached(budget, "tried out", plan(profile, STEPS, budget=budget))
        for reuse in ("corrected", "fitted", "linear", "residual"):
            yield from followed(profile, budget, reuse)
        yield cached(budget, "planned on ratios", fill(profile, ratio_schedule(profile, budget), "residual"))
        yield taylor(budget, lite=True)
        yield Case(budget, "fewer steps", "-", budget, "C" * budget, nothing, nothing)
    for budget in budgets:
        yield from followed(profile, budget, "scaled")
        yield taylor(budget, lite=False)


def followed(profile: Profile, budget: int, reuse: str) -> Iterator[Case]:
    """The three schedules with one reuse mode."""
    yield cached(budget, "planned", plan(profile, STEPS, budget=budget, reuse=reuse))
    yield cached(budget, "threshold", fill(profile, threshold_schedule(profile, budget), reuse))
    even = evenly_corrected if reuse == "corrected" else evenly_spaced
    yield cached(budget, "even", fill(profile, even(STEPS, budget), reuse))


def cached(budget: int, method: str, chosen: Any) -> Case:
    """A line that follows a plan."""
    assert chosen.computed == budget
    return Case(
        budget, method, chosen.reuse, STEPS, chosen.schedule,
        lambda transformer: apply_mag_cache(transformer, chosen), remove_mag_cache,
    )  # fmt: skip


def nothing(transformer: Any) -> None:
    """An uncached run."""


def threshold_schedule(profile: Profile, budget: int) -> str:
    """The threshold rule with exactly ``budget`` computed steps: the profile's K if it can, else the next that can."""
    for max_skip in range(profile.max_skip_steps, STEPS):
        for step in range(1, 4000):
            config: MagCacheConfig = profile.config(STEPS, threshold=step / 1000, max_skip_steps=max_skip)
            marks = schedule(config)
            if marks.count("C") == budget:
                return marks
            if marks.count("C") < budget:
                break
    raise ConfigError("budget", budget, "one that some threshold gives")


def ratio_schedule(profile: Profile, budget: int) -> str:
    """Planned on the magnitude ratios alone, as if no costs had been measured."""
    bare = replace(profile, branches={"cond": replace(profile.branch(), costs=None)})
    return plan(bare, STEPS, budget=budget, reuse="residual", max_skip_steps=LONGEST).schedule


def taylor(budget: int, lite: bool) -> Case:
    """Diffusers' TaylorSeer, first order, with exactly ``budget`` computed steps.

    Of its settings (computed steps at the start, interval, computed steps at the end) that give the budget, the one
    with the fewest at the end and nearest to its default of three at the start.
    """
    fitting = []
    for before in range(1, 7):
        for interval in range(1, STEPS):
            for after in range(STEPS, STEPS - 6, -1):
                marks = "".join(
                    "C" if i < before or (i - before - 1) % interval == 0 or i >= after else "." for i in range(STEPS)
                )
                if marks.count("C") == budget:
                    fitting.append((STEPS - after, abs(before - 3), before, interval, after, marks))
    _, _, before, interval, after, marks = min(fitting)
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        disable_cache_after_step=None if after == STEPS else after,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
    )
    # Its default replaces the attention layers only; the lite variant skips whole blocks, as MagCache does.
    return Case(
        budget, "TaylorSeer lite" if lite else "TaylorSeer", "-", STEPS, marks,
        lambda transformer: transformer.enable_cache(config), lambda transformer: transformer.disable_cache(),
    )  # fmt: skip


def run(model: Path, profile: Profile, out: Path, prompts: int, budgets: tuple[int, ...]) -> None:
    """Measure every line that ``out`` doesn't hold yet."""
    generator = Generator(model, draw_prompts(prompts, held_out=True, seed=PROMPT_SEED))
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"lines": []}
    document["setup"] = {
        "model": model.name,
        "profile": profile.name,
        "steps": STEPS,
        "prompts": prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
    }
    done = {(line["budget"], line["method"], line["reuse"]) for line in document["lines"]}
    reference = generator(STEPS)
    document["uncached"] = score(reference, reference, generator.prompts.scenes)
    for case in cases(profile, budgets):
        if case.key in done:
            continue
        started = time.perf_counter()
        case.prepare(generator.transformer)
        images = generator(case.steps)
        case.restore(generator.transformer)
        figures = score(images, reference, generator.prompts.scenes)
        line = {"budget": case.budget, "method": case.method, "reuse": case.reuse, "schedule": case.schedule}
        document["lines"].append(line | figures)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        print(
            f"{case.budget:3} {case.method:18} {case.reuse:9} {case.schedule} "
            f"{figures['psnr']:6.2f} dB, worst decile {figures['psnr_worst_decile']:6.2f}, ssim {figures['ssim']:.4f}, "
            f"colours {figures['checker_colours']:.3f} ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


def table(out: Path) -> str:
    """The results as a Markdown table, PSNR mean / worst decile in dB by number of computed steps."""
    document = json.loads(out.read_text())
    lines = {(line["budget"], line["method"], line["reuse"]): line for line in document["lines"]}
    budgets = sorted({budget for budget, _, _ in lines})
    rows = sorted({(method, reuse) for _, method, reuse in lines})
    text = ["| schedule | reuse | " + " | ".join(f"C = {budget}" for budget in budgets) + " |"]
    text.append("|---|---|" + "---|" * len(budgets))
    for method, reuse in rows:
        found = [lines.get((budget, method, reuse)) for budget in budgets]
        cells = ["" if f is None else f"{f['psnr']:.1f} / {f['psnr_worst_decile']:.1f}" for f in found]
        text.append(f"| {method} | {reuse} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def plot(out: Path) -> Path:
    """PSNR over computed steps, one line for each method, beside the results."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(out.read_text())
    series: dict[str, list[tuple[int, float]]] = {}
    for line in document["lines"]:
        label = line["method"] if line["reuse"] == "-" else f"{line['method']}, {line['reuse']}"
        series.setdefault(label, []).append((line["budget"], line["psnr"]))
    colours = {
        "threshold": "tab:blue",
        "planned": "tab:red",
        "even": "tab:green",
        "planned on ratios": "tab:purple",
        "TaylorSeer": "black",
        "TaylorSeer lite": "tab:orange",
        "fewer steps": "tab:brown",
    }
    styles = {"residual": "-", "scaled": ":", "linear": "--", "fitted": "-.", "corrected": "-"}
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for label, points in series.items():
        method, _, reuse = label.partition(", ")
        budgets, decibels = zip(*sorted(points), strict=True)
        axes.plot(
            budgets, decibels, marker="o", markersize=3, label=label,
            color=colours.get(method), linestyle=styles.get(reuse, "-"),
        )  # fmt: skip
    axes.set_xlabel(f"computed steps of {document['setup']['steps']}")
    axes.set_ylabel("PSNR against the uncached pictures, dB")
    axes.set_title(f"{document['setup']['model']}, {document['setup']['prompts']} held-out prompts")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    path = out.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--profile", default="flux-tiny", help="name or path")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planner.json"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--plot", action="store_true", help="only draw and tabulate what is there")
    args = parser.parse_args()
    if not args.plot:
        run(args.model, load_profile(args.profile), args.out, args.prompts, tuple(args.budgets))
    print(table(args.out))
    print(f"drawn in {plot(args.out)}")


if __name__ == "__main__":
    main()
