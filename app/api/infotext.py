"""What an image file says of itself, in the form of AUTOMATIC1111's web interface, which others read as well."""

from __future__ import annotations

import json
from collections.abc import Iterable

from app.api.backend import ImagesJob
from app.messages.results import DenoiseReport

_LONGEST = 6000
"""Characters kept of a prompt, beyond any that a text encoder reads: EXIF has room for 64 kB in two bytes each."""


def infotext(job: ImagesJob, index: int, report: DenoiseReport, model: str) -> str:
    """The prompts and settings of image ``index`` of ``job``: prompt, negative prompt, one line of ``Name: value``."""
    settings = {
        "Steps": job.num_inference_steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{1.0 if job.negative_prompt is None else job.true_cfg_scale:g}",
        "Distilled CFG Scale": f"{job.guidance_scale:g}",
        "Seed": job.seed + index,
        "Size": f"{job.width}x{job.height}",
        "Model": model,
        "Denoising strength": None if job.strength is None else f"{job.strength:g}",
        "Lora": _each(f"{use.name}: {use.scale:g}" for use in job.loras),
        "Lora hashes": _each(f"{use.name}: {use.digest[:12]}" for use in job.loras),
        "MagCache schedule": report.schedule,
        "MagCache negative schedule": report.negative_schedule,
        "Version": "flux-magcache-serve",
    }
    lines = [job.prompt[:_LONGEST]]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt[:_LONGEST]}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _each(entries: Iterable[str]) -> str | None:
    return ", ".join(entries) or None


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"\n') else text
