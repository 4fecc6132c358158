"""Whether the parts of a checkpoint fit each other and this engine, from their configurations alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from app.engine.checkpoint_files import CheckpointError, read_json
from app.engine.families import Family
from app.engine.layouts import Flux2Layout
from app.engine.sampling import FlowMatchSampler

SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__
QWEN3_LAYERS_READ = 3
"""FLUX.2-klein's prompt is the hidden states after so many layers of Qwen3, joined."""

_SAMPLES_OTHERWISE = {
    "stochastic_sampling": "noise is added at each step",
    "invert_sigmas": "sampling runs from 0 to 1",
}
_OWN_VAE = "use the VAE of the model's own repository"
_OWN_SCHEDULER = "use the scheduler folder of the model's own repository"
_SAME = "take both from one repository"


def check_fit(model: Path, family: Family, configs: Mapping[str, Any]) -> None:
    """Check that transformer, VAE and text encoders of ``model`` agree on their sizes.

    Args:
        configs: of each component with weights, by folder, defaults filled in.

    Raises:
        CheckpointError: two of them don't fit, or one is of a model that takes more inputs than are served.
    """
    path = model / "transformer" / "config.json"
    transformer, vae = configs["transformer"], configs["vae"]
    _check_vae(model / "vae" / "config.json", vae)
    inputs = transformer.in_channels
    outputs = transformer.patch_size**2 * (transformer.out_channels or inputs)
    if inputs != outputs:
        raise CheckpointError(
            f"{path}: the transformer takes {inputs} channels (in_channels) and gives {outputs}, as FLUX.1-Fill, "
            f"-Canny and -Depth do, whose further inputs are not served: use the transformer of {family.name}"
        )
    tokens = 4 * vae.latent_channels
    if inputs != tokens:
        raise CheckpointError(
            f"{path}: the transformer takes {inputs} channels (in_channels), and {vae.latent_channels} latent channels "
            f"of the VAE make {tokens}: {_SAME}"
        )
    axes, width = transformer.axes_dims_rope, transformer.attention_head_dim
    if not isinstance(axes, list | tuple) or sum(axes) != width:
        raise CheckpointError(f"{path}: axes_dims_rope is {axes!r}; the sum must be attention_head_dim, {width}")
    if bool(transformer.guidance_embeds) != (family.guidance_scale is not None):
        has = "has" if transformer.guidance_embeds else "has no"
        raise CheckpointError(f"{path}: the transformer {has} guidance embedding, unlike {family.name}'s: {_SAME}")
    for encoder, name, width in _prompt_widths(family, configs):
        if width != transformer[name]:
            raise CheckpointError(
                f"{path}: {name} is {transformer[name]}, and {encoder} gives embeddings of {width}: {_SAME}"
            )


def _check_vae(path: Path, vae: Any) -> None:
    shrinks = 2 ** (len(vae.block_out_channels) - 1)
    if (vae.in_channels, vae.out_channels, shrinks) != (3, 3, 8):
        raise CheckpointError(
            f"{path}: the VAE makes latents of 1/{shrinks} of the size from {vae.in_channels} channels; FLUX's "
            f"are 1/8, from 3: {_OWN_VAE}"
        )
    for name in ("scaling_factor", "shift_factor"):
        if name in vae and not (isinstance(vae[name], int | float) and isfinite(vae[name])):
            raise CheckpointError(f"{path}: {name} is {vae[name]!r}, and FLUX.1's VAE has a number: {_OWN_VAE}")


def _prompt_widths(family: Family, configs: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Each encoder's folder, the transformer's option that must equal its width, and the width."""
    first = configs["text_encoder"]
    if isinstance(family.layout, Flux2Layout):
        return [("text_encoder", "joint_attention_dim", QWEN3_LAYERS_READ * first.hidden_size)]
    return [
        ("text_encoder", "pooled_projection_dim", first.hidden_size),
        ("text_encoder_2", "joint_attention_dim", configs["text_encoder_2"].d_model),
    ]


def check_scheduler(model: Path) -> None:
    """Check that sampling follows all that the scheduler's configuration says.

    Raises:
        CheckpointError: another class, an option that sampling would ignore, or one that makes no noise schedule.
    """
    path = model / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    if config.get("_class_name") != SCHEDULER:
        raise CheckpointError(
            f"{path} names the class {config.get('_class_name')!r}; sampling needs {SCHEDULER}: {_OWN_SCHEDULER}"
        )
    for name, effect in _SAMPLES_OTHERWISE.items():
        if config.get(name):
            raise CheckpointError(f"{path}: with {name} {effect}, which is not served: remove it, or set it to false")
    if config.get("num_train_timesteps", 1000) != 1000:
        raise CheckpointError(f"{path}: num_train_timesteps is {config['num_train_timesteps']!r}; FLUX's are 1000")
    known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise CheckpointError(f"{path}: {name} is {value!r}, which {SCHEDULER} does not know: remove it")
    try:
        with np.errstate(all="raise"):
            sigmas = FlowMatchSampler(model).sigmas(28, 4096)
    except (ImportError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path} gives no noise schedule ({reason}): {_OWN_SCHEDULER}") from error
    if not sigmas.isfinite().all() or sigmas[0] > 1 or (sigmas.diff() >= 0).any():
        start = ", ".join(f"{sigma:.3g}" for sigma in sigmas[:3].tolist())
        raise CheckpointError(f"{path}: its noise schedule, {start}, ..., does not fall from 1 to 0: {_OWN_SCHEDULER}")
