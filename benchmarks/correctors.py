"""Predicting and correcting velocities against reuse and against other solvers: ``python -m benchmarks.correctors``.

flux-tiny, 28 steps, held-out prompts, in a sampling loop of its own on diffusers' transformer. Every line is compared
with two references: the uncached 28 Euler steps, and the true solution of the differential equation (Adams-Bashforth of
third order with 56 evaluations). ``AB2`` and ``AB2+AM3`` run as many steps as they evaluate, without a cache: what a
better solver than Euler's does at the same cost. Results are kept as JSON after every line, and an interrupted run
goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from app.control.likeness import psnr
from benchmarks.pictures import BATCH, SEED, Generator, draw_prompts
from magcache_core import Plan, Profile, apply_mag_cache, fill, load_profile, plan, remove_mag_cache
from magcache_core.correct import evenly_corrected, mean_over, velocity_steps
from magcache_core.planner import whole_plan

STEPS = 28
TRUE_STEPS = 56
BUDGETS = (6, 8, 10, 14, 20)
PROMPT_SEED = 2
RESIDUALS = {
    6: "C...C....C....C...C....C....",
    8: "C.C.C..C....C.....C....C..C.",
    10: "C..C..C..C..C..C..C..C..C.C.",
    14: "C.C.C.C.C.C..CC..CC..CC.C.C.",
    20: "CCCCCCCCCC.C.C.C.C.C.C.C.CCC",
}
"""What trials found for residuals, before velocities were tried: ``fitted`` at 8, else ``linear``."""
RULE = "CCC.....C....C...C...C..C.C."
"""The authors' rule with flux-tiny's curve, 9 computed steps."""

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
Sampler = Callable[[torch.Tensor, Velocity], torch.Tensor]
Line = tuple[int, str, str, Callable[[], torch.Tensor]]


class Loop:
    """Sampling by hand: noise to images, with a rule for how velocities move the latents."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.pipe = generator.pipe
        self.tokens = (generator.size // 16) ** 2

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of a run as the pipeline sets them, the final 0 included."""
        config = self.pipe.scheduler.config
        shift = calculate_shift(
            self.tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        self.pipe.scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=shift)
        levels: list[float] = self.pipe.scheduler.sigmas.tolist()
        return levels

    @torch.inference_mode()
    def images(self, sample: Sampler) -> torch.Tensor:
        """Images in [0, 1], (prompts, 3, size, size)."""
        count = len(self.generator.prompts.texts)
        return torch.cat([self._run(range(s, min(s + BATCH, count)), sample) for s in range(0, count, BATCH)])

    def _run(self, rows: range, sample: Sampler) -> torch.Tensor:
        generator, pipe = self.generator, self.pipe
        part = slice(rows.start, rows.stop)
        noise, image_ids = pipe.prepare_latents(
            len(rows), pipe.transformer.config.in_channels // 4, generator.size, generator.size, torch.float32, "cpu",
            [torch.Generator().manual_seed(SEED + i) for i in rows],
        )  # fmt: skip
        text = generator.embeds[part]
        text_ids = torch.zeros(text.shape[1], 3)
        guidance = torch.full((len(rows),), generator.guidance)

        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            out: torch.Tensor = pipe.transformer(
                hidden_states=latents,
                timestep=torch.full((len(rows),), sigma),
                guidance=guidance,
                pooled_projections=generator.pooled[part],
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            return out

        latents = sample(noise, velocity)
        unpacked = pipe._unpack_latents(latents, generator.size, generator.size, pipe.vae_scale_factor)
        config = pipe.vae.config
        decoded = pipe.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        pixels: torch.Tensor = (decoded / 2 + 0.5).clamp(0, 1)
        return pixels


def euler(sigmas: Sequence[float]) -> Sampler:
    """Every step computed."""
    return adams_bashforth(sigmas, 1)


def adams_bashforth(sigmas: Sequence[float], order: int) -> Sampler:
    """Every step computed, moved along the polynomial through the last ``order`` velocities."""

    def sample(latents: torch.Tensor, velocity: Velocity) -> torch.Tensor:
        known: list[tuple[float, torch.Tensor]] = []
        for begin, end in pairwise(sigmas):
            known = [(begin, velocity(latents, begin)), *known][:order]
            for (_, v), weight in zip(known, mean_over(begin, end, [sigma for sigma, _ in known]), strict=True):
                latents = latents + (end - begin) * weight * v
        return latents

    return sample


def corrected(schedule: str, sigmas: Sequence[float], mode: str) -> Sampler:
    """Predict and correct, one move of the latents for each computed step."""
    steps = velocity_steps(schedule, sigmas, mode)

    def sample(latents: torch.Tensor, velocity: Velocity) -> torch.Tensor:
        known: list[torch.Tensor] = []
        for step, sigma in zip(steps, sigmas, strict=False):
            if step.move:
                known = [velocity(latents, sigma), *known][: len(step.move)]
                latents = latents + sum(weight * v for weight, v in zip(step.move, known, strict=True))
        return latents

    return sample


def lines(profile: Profile, loop: Loop, budgets: Sequence[int]) -> Iterator[Line]:
    """(computed steps, method, schedule, how to make the images) of each line."""
    sigmas = loop.sigmas(STEPS)

    def reused(followed: Plan) -> torch.Tensor:
        apply_mag_cache(loop.generator.transformer, followed)
        images = loop.generator(STEPS)
        remove_mag_cache(loop.generator.transformer)
        return images

    def moved(marks: str, mode: str, levels: Sequence[float] = sigmas) -> torch.Tensor:
        return loop.images(corrected(marks, levels, mode))

    yield STEPS, "Euler, uncached", "C" * STEPS, partial(loop.images, euler(sigmas))
    yield RULE.count("C"), "rule, residual", RULE, partial(reused, Plan(RULE, "residual"))
    yield RULE.count("C"), "rule, corrected", RULE, partial(moved, RULE, "corrected")
    for budget in budgets:
        every, own = "C" * budget, loop.sigmas(budget)
        residuals = fill(profile, RESIDUALS[budget], "fitted" if budget == 8 else "linear")
        tried, planned = plan(profile, STEPS, budget=budget), plan(profile, STEPS, budget=budget, reuse="corrected")
        even = evenly_corrected(STEPS, budget)
        yield budget, "tried, residuals", residuals.schedule, partial(reused, residuals)
        yield budget, "its schedule, corrected", residuals.schedule, partial(moved, residuals.schedule, "corrected")
        yield budget, "tried", tried.schedule, partial(reused, tried)
        yield budget, "tried, integrated", tried.schedule, partial(moved, tried.schedule, "integrated")
        yield budget, "planned, corrected", planned.schedule, partial(moved, planned.schedule, "corrected")
        yield budget, "planned, integrated", planned.schedule, partial(moved, planned.schedule, "integrated")
        if (whole := whole_plan(profile, budget)) is not None:
            yield budget, "as a whole, corrected", whole.schedule, partial(moved, whole.schedule, "corrected")
            yield budget, "as a whole, integrated", whole.schedule, partial(moved, whole.schedule, "integrated")
        yield budget, "even, corrected", even, partial(moved, even, "corrected")
        yield budget, "even, integrated", even, partial(moved, even, "integrated")
        yield budget, "AB2", every, partial(loop.images, adams_bashforth(own, 2))
        yield budget, "AB2+AM3", every, partial(moved, every, "integrated", own)


def run(
    model: Path,
    profile: Profile,
    out: Path,
    prompts: int,
    budgets: Sequence[int],
    lines: Callable[[Profile, Loop, Sequence[int]], Iterator[Line]] = lines,
) -> None:
    """Measure the lines that ``out`` doesn't hold yet, and drop those of other schedules."""
    loop = Loop(Generator(model, draw_prompts(prompts, held_out=True, seed=PROMPT_SEED)))
    setup = {
        "model": model.name,
        "profile": profile.name,
        "steps": STEPS,
        "prompts": prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
    }
    known = json.loads(out.read_text()) if out.exists() else {"setup": setup, "lines": []}
    done = {_key(line): line for line in known["lines"] if known["setup"] == setup}
    references = {
        "uncached": loop.images(euler(loop.sigmas(STEPS))),
        "true": loop.images(adams_bashforth(loop.sigmas(TRUE_STEPS), 3)),
    }
    wanted = list(lines(profile, loop, budgets))
    out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        kept = [done[line[:3]] for line in wanted if line[:3] in done]
        out.write_text(json.dumps({"setup": setup, "lines": kept}, indent=1) + "\n")

    write()
    for computed, method, marks, make in wanted:
        if (computed, method, marks) in done:
            continue
        images = make()
        line: dict[str, Any] = {"computed": computed, "method": method, "schedule": marks}
        for name, reference in references.items():
            decibels = psnr(images, reference).sort().values
            worst = decibels[: max(1, prompts // 10)]
            line[name] = [round(decibels.mean().item(), 2), round(worst.mean().item(), 2)]
        done[_key(line)] = line
        write()
        print(f"{computed:3} {method:32} {marks} {line['uncached']} {line['true']}", flush=True)


def _key(line: dict[str, Any]) -> tuple[int, str, str]:
    return line["computed"], line["method"], line["schedule"]


def table(out: Path) -> str:
    """The results as two Markdown tables, PSNR mean / worst tenth in dB by number of computed steps."""
    found = json.loads(out.read_text())["lines"]
    budgets = sorted({line["computed"] for line in found})
    methods = list(dict.fromkeys(line["method"] for line in found))
    text = []
    for name in ("uncached", "true"):
        text += [f"| vs {name} | " + " | ".join(f"C = {budget}" for budget in budgets) + " |"]
        text += ["|---|" + "---|" * len(budgets)]
        for method in methods:
            cells = {line["computed"]: "{} / {}".format(*line[name]) for line in found if line["method"] == method}
            text.append(f"| {method} | " + " | ".join(cells.get(budget, "") for budget in budgets) + " |")
        text.append("")
    return "\n".join(text)


def main(
    name: str = "correctors",
    text: str | None = __doc__,
    lines: Callable[[Profile, Loop, Sequence[int]], Iterator[Line]] = lines,
) -> None:
    """The command line, of this benchmark or of another one with other ``lines``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--profile", default="flux-tiny", help="name or path")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{name}.json"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), choices=BUDGETS)
    args = parser.parse_args()
    run(args.model, load_profile(args.profile), args.out, args.prompts, args.budgets, lines)
    print(table(args.out))


if __name__ == "__main__":
    main()
