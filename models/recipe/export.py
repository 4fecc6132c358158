"""Stage export: the trained parts as a diffusers folder in bfloat16 that FluxPipeline.from_pretrained loads."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import transformer, vae
from .text import Text

MAX_MB = 24


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's settings."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def pipeline(autoencoder: AutoencoderKL, text: Text, model: FluxTransformer2DModel) -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=scheduler(),
        vae=autoencoder,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(autoencoder: AutoencoderKL, text: Text, model: FluxTransformer2DModel, out: Path) -> None:
    """Written beside `out` and then put in its place; a model card and pictures that stand there are kept."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline(autoencoder, text, model).to(torch.bfloat16).save_pretrained(fresh, safe_serialization=True)
    for config in fresh.glob("*/config.json"):
        tidy(config)
    for weights in fresh.glob("*/*.safetensors"):
        weights.chmod(0o644)  # Some writers leave them readable by their owner alone.
    if out.exists():
        for extra in (*out.glob("*.md"), *out.glob("*.png"), *out.glob("evaluation.json")):
            shutil.copy2(extra, fresh / extra.name)
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    megabytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    if megabytes > MAX_MB:
        raise RuntimeError(f"{out} holds {megabytes:.1f} MB, which is more than {MAX_MB}")
    print(f"export: {megabytes:.1f} MB in {out.name}")


def from_work(work: Path, out: Path, device: torch.device) -> None:
    """The furthest state of every part."""
    autoencoder = vae.load(work, device, "vae-polished" if (work / "vae-polished").exists() else "vae")
    stage = "distill" if (work / "distill.pt").exists() else "transformer"
    export(autoencoder, Text.load(work, device), transformer.averaged(work, device, stage), out)


def tidy(config: Path) -> None:
    """Make a part's configuration mean the same everywhere.

    diffusers notes the folder that a part was loaded from, which is of no use to anyone else. transformers loads in the
    dtype that the configuration names, diffusers in float32: unless both agree, the plain `from_pretrained` mixes them.
    """
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    if "dtype" in content:
        content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")
