"""Where the default has to be another one: ``python -m benchmarks.regions``.

flux-tiny away from what its profile was measured with: under true CFG, at a guidance that it was not trained for, from
a source image, in few steps. For each, the images of held-out prompts by the former default and by today's are compared
with the uncached ones, and the pixel checker looks at all three. Uncached images are kept in ``out/regions``; results
are kept as JSON after every line, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline

from app.messages.jobs import first_step
from benchmarks.pictures import BATCH, SEED, Generator, draw_prompts, score
from magcache_core import (
    Plan,
    Profile,
    apply_mag_cache,
    choose,
    load_profile,
    pick_profile,
    profile_names,
    remove_mag_cache,
    schedule,
)
from models.recipe import scenes, tokens

PROMPT_SEED = 21
WHOLE = "C.C..C..C..C...C...C...C.C.C"
"""flux-tiny's default at 28 steps."""
PLAIN = load_profile("flux-tiny")
EDITS = ("C.C..C..C..C.C.CC", "CCC.C...C..C..C.C", "CCCCC...C..C..C.C", "C.C.C.C.C.C.CCCCC")
"""Beside the default: the plan of 8 that weighs predictions three times as much, those of 8 and 9 whose first 3 and 5
steps compute, and that of 11."""


@dataclass(frozen=True)
class Region:
    """Images that are not like those of the profile.

    Attributes:
        former: the schedule and reuse mode that were the default.
        others: further schedules of `corrected`, to compare with.
    """

    name: str
    former: tuple[str, str]
    steps: int = 28
    guidance: float = 3.5
    true_cfg_scale: float = 1.0
    strength: float | None = None
    others: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """The first step that runs."""
        return first_step(self.steps, self.strength)

    def plan(self, profile: Profile) -> Plan:
        """What ``profile`` makes of such a request that names nothing."""
        return choose(
            profile.tail(self.first, self.steps),
            self.steps - self.first,
            guidance_scale=self.guidance,
            true_cfg_scale=self.true_cfg_scale,
        )


REGIONS = (
    Region("true CFG 2", (WHOLE, "residual"), true_cfg_scale=2.0),
    Region("true CFG 4", (WHOLE, "residual"), true_cfg_scale=4.0),
    Region("true CFG 7", (WHOLE, "residual"), true_cfg_scale=7.0),
    Region("guidance 7", (WHOLE, "corrected"), guidance=7.0),
    Region("strength 0.6", ("C..C...C..C..C.CC", "linear"), strength=0.6, others=EDITS),
    Region("12 steps", (schedule(PLAIN.config(12)), "residual"), steps=12),
)


class Runner:
    """Makes the images of a region, always from the same noise."""

    def __init__(self, model: Path, prompts: int, kept: Path) -> None:
        self._generator = Generator(model, draw_prompts(prompts, held_out=True, seed=PROMPT_SEED))
        self._edit: Any = FluxImg2ImgPipeline(**self._generator.pipe.components)
        self._edit.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            self._empty, self._empty_pooled, _ = self._generator.pipe.encode_prompt(
                prompt="", prompt_2=None, max_sequence_length=tokens.T5_LENGTH
            )
        self._sources = self._neighbours()
        self._kept = kept
        kept.mkdir(parents=True, exist_ok=True)

    def _neighbours(self) -> torch.Tensor:
        """Source images: each prompt starts from the next one's scene; (prompts, 3, size, size) in [0, 1]."""
        rng, size = np.random.default_rng([78, PROMPT_SEED]), self._generator.size
        first, *others = self._generator.prompts.scenes
        drawn = [scenes.render(s.background, scenes.place(s, size, size, rng), size, size) for s in (*others, first)]
        return torch.from_numpy(np.stack(drawn)).float().div(255).permute(0, 3, 1, 2)

    def uncached(self, region: Region) -> torch.Tensor:
        """The images with every step computed, (prompts, 3, size, size) in [0, 1]."""
        what = region.steps, region.guidance, region.true_cfg_scale, region.strength
        file = self._kept / f"{len(self._sources)}-{PROMPT_SEED}-{'-'.join(map(str, what))}.pt"
        if not file.exists():
            torch.save(self._images(region), file)
        images: torch.Tensor = torch.load(file)
        return images

    def score(self, region: Region, followed: Plan | None) -> dict[str, float]:
        """How close the images of a plan are to the uncached ones, and what the checker says of them."""
        uncached = self.uncached(region)
        images = uncached if followed is None else self._cached(region, followed)
        return score(images, uncached, self._generator.prompts.scenes)

    def _cached(self, region: Region, followed: Plan) -> torch.Tensor:
        # The hooks count the steps that a source image leaves out.
        whole = Plan("C" * region.first + followed.schedule, followed.reuse)
        apply_mag_cache(self._generator.transformer, whole)
        try:
            return self._images(region)
        finally:
            remove_mag_cache(self._generator.transformer)

    @torch.inference_mode()
    def _images(self, region: Region) -> torch.Tensor:
        count = len(self._sources)
        return torch.cat([self._run(range(s, min(s + BATCH, count)), region) for s in range(0, count, BATCH)])

    def _run(self, rows: range, region: Region) -> torch.Tensor:
        generator, part = self._generator, slice(rows.start, rows.stop)
        pipe = generator.pipe if region.strength is None else self._edit
        arguments: dict[str, Any] = {
            "prompt_embeds": generator.embeds[part],
            "pooled_prompt_embeds": generator.pooled[part],
            "num_inference_steps": region.steps,
            "guidance_scale": region.guidance,
            "width": generator.size,
            "height": generator.size,
            "generator": [torch.Generator().manual_seed(SEED + i) for i in rows],
            "output_type": "pt",
        }
        if region.strength is not None:
            arguments |= {"image": self._sources[part], "strength": region.strength}
        if region.true_cfg_scale > 1:
            arguments |= {
                "true_cfg_scale": region.true_cfg_scale,
                "negative_prompt_embeds": self._empty.expand(len(rows), -1, -1),
                "negative_pooled_prompt_embeds": self._empty_pooled.expand(len(rows), -1),
            }
        images: torch.Tensor = pipe(**arguments).images
        return images.clamp(0, 1)


def lines(region: Region) -> dict[str, tuple[str, Plan | None]]:
    """By name, the profile and the plan of each line; None computes every step."""
    shipped = [load_profile(name) for name in profile_names()]
    picked = pick_profile("flux-tiny", region.steps, 128, 128, shipped, region.guidance, region.true_cfg_scale)
    found: dict[str, tuple[str, Plan | None]] = {
        "uncached": ("", None),
        "former": (PLAIN.name, Plan(*region.former)),
        "now": (picked.name, region.plan(picked)),
    }
    if picked is not PLAIN:
        found["now, without it"] = (PLAIN.name, region.plan(PLAIN))
    return found | {f"other, {marks}": (PLAIN.name, Plan(marks, "corrected")) for marks in region.others}


def run(model: Path, out: Path, prompts: int, kept: Path) -> None:
    """Measure what ``out`` does not hold yet, and drop what is no longer asked for."""
    runner = Runner(model, prompts, kept)
    setup = {
        "model": model.name,
        "prompts": prompts,
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
    }
    known = json.loads(out.read_text()) if out.exists() else {"setup": setup, "lines": []}
    done = {_key(line): line for line in known["lines"] if known["setup"] == setup}
    document: dict[str, Any] = {"setup": setup, "lines": []}
    for region in REGIONS:
        for name, (profile, followed) in lines(region).items():
            line: dict[str, Any] = {
                "region": region.name,
                "default": name,
                "profile": profile,
                "schedule": "C" * (region.steps - region.first) if followed is None else followed.schedule,
                "reuse": "" if followed is None else followed.reuse,
            }
            document["lines"].append(done.get(_key(line)) or line | runner.score(region, followed))
            out.write_text(json.dumps(document, indent=1) + "\n")
            print(json.dumps(document["lines"][-1]), flush=True)


def _key(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(line[name] for name in ("region", "default", "profile", "schedule", "reuse"))


def table(out: Path) -> str:
    """The results as a Markdown table: PSNR in dB, mean / mean of the worst tenth, and the checker's right colours."""
    text = [
        "| | default | profile | computed | reuse | PSNR, worst tenth | right colours |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in json.loads(out.read_text())["lines"]:
        marks = line["schedule"]
        computed = f"{marks.count('C')} of {len(marks)}"
        close = "" if line["default"] == "uncached" else "{psnr:.1f} / {psnr_worst_decile:.1f}".format(**line)
        cells = (line["region"], line["default"], line["profile"], computed, line["reuse"], close)
        text.append("| " + " | ".join(cells) + f" | {line['checker_colours']:.2f} |")
    return "\n".join(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/flux-tiny"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/regions.json"))
    parser.add_argument("--kept", type=Path, default=Path("out/regions"), help="folder of the uncached images")
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    run(args.model, args.out, args.prompts, args.kept)
    print(table(args.out))


if __name__ == "__main__":
    main()
