"""Calibrate a model: ``python -m magcache_core.calibrate --model PATH --steps 28 --size 1024x1024 --out profile.json``.

Runs the pipeline uncached over several prompts and seeds, measures the residuals and what reuse would have cost, and
writes a versioned profile. Works with diffusers pipelines whose transformer has a registered strategy.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from magcache_core.measure import BranchTrace, measure_sensitivity, recording
from magcache_core.profile_data import Profile, write_profile
from magcache_core.profile_store import load_profile
from magcache_core.reuse import REUSE_MODES
from magcache_core.row_sums import MeasuredStep, RowMeasurement
from magcache_core.run_sums import BranchSums
from magcache_core.trials import try_schedules

COND, UNCOND = "cond", "uncond"
"""The branches of true CFG, by diffusers' names of their contexts."""


@dataclass(frozen=True)
class CalibrationJob:
    """What to run.

    Attributes:
        prompts: one run each, times ``seeds``, but for the last ``held_out``.
        steps: denoising steps.
        width, height: pixels.
        guidance_scale: distilled guidance.
        negative_prompt: with it true CFG runs: the unconditional branch is measured apart, and velocities are those
            that both make together.
        true_cfg_scale: scale of true CFG.
        seeds: runs of each prompt, seeded 0, 1, ...
        batch: runs at once.
        max_sequence_length: text tokens; None takes the pipeline's default.
        held_out: so many of the last prompts are not measured; they judge the schedules that the others chose.
    """

    prompts: tuple[str, ...]
    steps: int = 28
    width: int = 1024
    height: int = 1024
    guidance_scale: float = 3.5
    negative_prompt: str | None = None
    true_cfg_scale: float = 4.0
    seeds: int = 1
    batch: int = 1
    max_sequence_length: int | None = None
    held_out: int = 0

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each run that measures."""
        return self._runs_of(self.prompts[: len(self.prompts) - self.held_out])

    @property
    def judging_runs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each held-out run."""
        return self._runs_of(self.prompts[len(self.prompts) - self.held_out :])

    def _runs_of(self, prompts: Sequence[str]) -> list[tuple[str, int]]:
        return [(prompt, seed) for seed in range(self.seeds) for prompt in prompts]


def held_out_by_default(prompts: int) -> int:
    """How many of so many prompts judge schedules where nothing is said: four, a third of few prompts, none of two."""
    return min(4, prompts // 3)


def packaged_prompts() -> tuple[str, ...]:
    """The prompts that are used when none are given: everyday subjects and styles."""
    return read_prompts((resources.files("magcache_core") / "prompts.txt").read_text(encoding="utf-8"))


def read_prompts(text: str) -> tuple[str, ...]:
    """One prompt a line; blank lines don't count. ValueError when there are none."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise ValueError("the prompt list is empty")
    return prompts


def calibrate(pipe: Any, job: CalibrationJob, name: str, model: str, progress: bool = True) -> Profile:
    """Measure a loaded pipeline.

    Args:
        pipe: a diffusers pipeline with ``transformer`` and ``scheduler``.
        job: what to run.
        name: the profile's name.
        model: the model's id, kept in the profile.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    pipe.set_progress_bar_config(disable=True)
    sums: dict[str, BranchSums] = {}
    runs = job.runs
    bar = tqdm(total=len(runs) * job.steps, unit="step", disable=not progress, desc=f"calibrating {name}")
    for start in range(0, len(runs), job.batch):
        batch = runs[start : start + job.batch]
        with recording(pipe.transformer) as traces:
            pipe(**_call_arguments(pipe, job, batch))
        sigmas = pipe.scheduler.sigmas.tolist()
        grams = {branch: before.gram for branch, before in sums.items()}
        # Another pipeline may name its one branch as it likes.
        names = sorted(traces, key=(COND, UNCOND).index) if len(traces) > 1 else list(traces)
        run = RowMeasurement(sigmas, names, job.true_cfg_scale, grams)
        for steps in zip(*(_steps(traces[name]) for name in names), strict=True):
            run.add(steps)
            bar.update(len(batch))
        sums = {branch: sums[branch] + measured if sums else measured for branch, measured in run.sums.items()}
    sensitivity = _sensitivity(pipe, job, runs[: job.batch], progress)
    bar.close()
    return Profile(
        name=name,
        model=model,
        transformer=type(pipe.transformer).__name__,
        steps=job.steps,
        width=job.width,
        height=job.height,
        guidance_scale=job.guidance_scale,
        true_cfg_scale=job.true_cfg_scale if UNCOND in sums else None,
        sigmas=tuple(round(sigma, 6) for sigma in sigmas[: job.steps]),
        branches={branch: measured.curve(sensitivity) for branch, measured in sums.items()},
        provenance=_provenance(pipe, job),
    )


def try_out(
    pipe: Any,
    job: CalibrationJob,
    profile: Profile,
    runs: int,
    moves: int,
    budgets: Sequence[int] | None = None,
    progress: bool = True,
) -> Profile:
    """``profile`` with the schedules that came closest on the job's first ``runs`` runs, by its held-out runs if any.

    See `try_schedules`.
    """
    from tqdm import tqdm

    chosen_on, judged_on = job.runs[:runs], job.judging_runs

    def images(asked: Sequence[tuple[str, int]]) -> torch.Tensor:
        batches = [asked[start : start + job.batch] for start in range(0, len(asked), job.batch)]
        arguments = [_call_arguments(pipe, job, batch) | {"output_type": "pt"} for batch in batches]
        return torch.cat([pipe(**each).images for each in arguments])

    with tqdm(unit="budget", disable=not progress, desc="trying schedules") as bar:
        trials = try_schedules(
            pipe.transformer,
            lambda: images(chosen_on),
            profile,
            moves,
            budgets,
            progress=lambda: bar.update(1),
            judge=(lambda: images(judged_on)) if judged_on else None,
        )
    split = {"chosen_on_first": len(chosen_on), "judged_on_last": len(judged_on)}
    return replace(profile, trials=trials, provenance={**profile.provenance, "trials": split})


def _steps(trace: BranchTrace) -> list[MeasuredStep]:
    return [MeasuredStep(*step) for step in zip(trace.residuals, trace.velocities, trace.replays, strict=True)]


def _sensitivity(pipe: Any, job: CalibrationJob, batch: Sequence[tuple[str, int]], progress: bool) -> list[float]:
    """Measured on one batch: it is a property of the flow more than of a prompt."""
    from tqdm import tqdm

    def run() -> list[torch.Tensor]:
        latents: list[torch.Tensor] = []

        def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            latents.append(tensors["latents"].clone())
            return tensors

        pipe(**_call_arguments(pipe, job, batch), callback_on_step_end=note)
        return latents

    with tqdm(unit="run", disable=not progress, desc="sensitivity") as bar:
        return measure_sensitivity(pipe.transformer, run, job.steps, progress=lambda: bar.update(1))


def _call_arguments(pipe: Any, job: CalibrationJob, batch: Sequence[tuple[str, int]]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": [prompt for prompt, _ in batch],
        "num_inference_steps": job.steps,
        "width": job.width,
        "height": job.height,
        "guidance_scale": job.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        "output_type": "latent",
    }
    if job.negative_prompt is not None:
        arguments["negative_prompt"] = [job.negative_prompt] * len(batch)
        arguments["true_cfg_scale"] = job.true_cfg_scale
    if job.max_sequence_length is not None:
        arguments["max_sequence_length"] = job.max_sequence_length
    accepted = inspect.signature(pipe.__call__).parameters
    unknown = set(arguments) - set(accepted) - {"guidance_scale"}
    if unknown:
        raise ValueError(f"{type(pipe).__name__} does not take {', '.join(sorted(unknown))}")
    return {key: value for key, value in arguments.items() if key in accepted}


def _provenance(pipe: Any, job: CalibrationJob) -> dict[str, Any]:
    config = pipe.scheduler.config
    shift = {key: config[key] for key in sorted(config) if "shift" in key}
    text = "\n".join(f"{seed} {prompt}" for prompt, seed in [*job.runs, *job.judging_runs])
    return {
        "source": "measured by magcache_core.calibrate",
        "scheduler": type(pipe.scheduler).__name__,
        "shift": shift,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.transformer.device.type),
        "runs": len(job.runs),
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "negative_prompt": job.negative_prompt,
        "true_cfg_scale": job.true_cfg_scale if job.negative_prompt is not None else None,
        "versions": {package: metadata.version(package) for package in ("torch", "diffusers", "transformers")}
        | {"python": platform.python_version()},
    }


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not separator or not width.isdigit() or not height.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 1024x1024")
    return int(width), int(height)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m magcache_core.calibrate", description=__doc__)
    parser.add_argument("--model", required=True, help="model id or folder in diffusers layout")
    parser.add_argument("--out", required=True, type=Path, help="profile to write (JSON)")
    parser.add_argument("--name", help="the profile's name; by default that of the file")
    parser.add_argument("--model-id", help="model id to keep in the profile; by default --model")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line; by default a packaged list")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="pixels, 1024x1024 by default")
    parser.add_argument("--guidance", type=float, default=3.5, help="distilled guidance scale")
    parser.add_argument("--negative-prompt", help="run true CFG with it and measure its branch apart")
    parser.add_argument("--true-cfg-scale", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each prompt")
    parser.add_argument("--batch", type=int, default=1, help="runs at once")
    parser.add_argument("--max-sequence-length", type=int, help="text tokens; the pipeline's default otherwise")
    parser.add_argument("--reuse", choices=REUSE_MODES, default="corrected", help="reuse mode to recommend")
    parser.add_argument("--budget", type=int, help="computed steps to recommend; without it, the threshold rule")
    parser.add_argument(
        "--trials", type=int, default=4, metavar="RUNS", help="runs to try schedules out on; 0 only predicts errors"
    )
    parser.add_argument(
        "--judge",
        type=int,
        metavar="PROMPTS",
        help="last prompts that measure nothing and judge the best schedules; 4, of fewer than 12 prompts a third",
    )
    parser.add_argument("--moves", type=int, default=6, help="neighbours of each best schedule to try out as well")
    parser.add_argument("--refine", metavar="PROFILE", help="measure nothing and only try schedules of this one again")
    parser.add_argument("--budgets", type=int, nargs="+", help="numbers of computed steps to try; all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    from diffusers import DiffusionPipeline

    args = _arguments(argv)
    prompts = packaged_prompts() if args.prompts is None else read_prompts(args.prompts.read_text(encoding="utf-8"))
    job = CalibrationJob(
        prompts=prompts,
        steps=args.steps,
        width=args.size[0],
        height=args.size[1],
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        true_cfg_scale=args.true_cfg_scale,
        seeds=args.seeds,
        batch=args.batch,
        max_sequence_length=args.max_sequence_length,
        held_out=held_out_by_default(len(prompts)) if args.judge is None else args.judge,
    )
    if not 0 <= job.held_out < len(prompts):
        raise SystemExit(f"--judge is {job.held_out}; of {len(prompts)} prompts one at least measures")
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    if args.refine is None:
        measured = calibrate(pipe, job, args.name or args.out.stem, args.model_id or args.model)
        profile = replace(measured, reuse=args.reuse, budget=args.budget)
    else:
        profile = load_profile(args.refine)
        job = replace(job, steps=profile.steps, width=profile.width, height=profile.height)
        again = {"budgets": args.budgets, "runs": args.trials, "moves": args.moves}
        profile = replace(profile, provenance={**profile.provenance, "refined": again})
    if args.trials > 0:
        profile = try_out(pipe, job, profile, args.trials, args.moves, args.budgets)
    write_profile(profile, args.out)
    print(f"wrote {args.out}: {len(job.runs)} runs, branches {', '.join(profile.branches)}")


if __name__ == "__main__":
    main()
