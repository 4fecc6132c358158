"""What a low-rank adapter's file changes: its keys, in any of the usual layouts, as linears of the transformer.

Trainers name the same linear in several ways. Diffusers and PEFT use diffusers' own paths; BFL's layout, which ComfyUI
and ai-toolkit share, joins projections that read the same input; kohya's scripts write either with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from app.engine.single_file import SWAPPED, bfl_modules

if TYPE_CHECKING:
    from diffusers import ModelMixin

Kind = Literal["down", "up", "alpha"]

_PREFIXES = (
    "base_model.model.",
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
)
_TEXT_ENCODERS = ("text_encoder", "lora_te", "text_model.")
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.default)?\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
_REFUSED = {
    "dora_scale": "is a DoRA, whose magnitudes need the whole weight of each layer",
    "lora_magnitude_vector": "is a DoRA, whose magnitudes need the whole weight of each layer",
    ".lokr_": "is a LoKr",
    ".hada_": "is a LoHa",
    ".oft_": "is an OFT",
    ".diff": "changes weights or biases by full differences",
    ".bias": "changes biases",
    "_norm.scale": "is a control LoRA with norms of its own",
}
"""Parts of keys, and what a file with them is; the first that is found counts."""


class LoraError(ValueError):
    """An adapter that cannot be applied; the message names the file and what to do."""


@dataclass(frozen=True)
class Key:
    """One tensor of an adapter's file: which part of the pair for ``module``, a key of `targets`."""

    module: str
    kind: Kind


@dataclass(frozen=True)
class Target:
    """What a module of a file is in diffusers' transformer.

    Attributes:
        inputs: its input features.
        outputs: the linears whose outputs it joins, in order, with their numbers.
        halves_swapped: the second half of the outputs stands before the first.
    """

    inputs: int
    outputs: Mapping[str, int]
    halves_swapped: bool = False


def targets(transformer: ModelMixin) -> dict[str, Target]:
    """Every module that a file may name, by its name with underscores; ``transformer`` may be on the meta device."""
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    named = {_flat(name): Target(one.in_features, {name: one.out_features}) for name, one in linears.items()}
    for module, parts in bfl_modules(transformer):
        if set(parts) <= set(linears):  # else a norm, or a guidance embedding that this model lacks
            outputs = {part: linears[part].out_features for part in parts}
            named[_flat(module)] = Target(linears[parts[0]].in_features, outputs, module == SWAPPED)
    return named


def parse(key: str) -> Key | None:
    """What the tensor ``key`` is; None for a part of a text encoder.

    Raises:
        LoraError: it is no part of a plain low-rank adapter; the message goes on from the file's name.
    """
    if key.startswith(_TEXT_ENCODERS):
        return None
    for mark, what in _REFUSED.items():
        if mark in key:
            raise LoraError(
                f"{what} ({key}); only plain LoRAs are applied: use another file, or merge it into the model"
            )
    found = _KEY.fullmatch(key)
    if found is None:
        raise LoraError(f"holds the tensor {key!r}, which is no part of a LoRA in diffusers', BFL's or kohya's layout")
    kind: Kind = "down" if found["down"] else "up" if found["up"] else "alpha"
    module = found["module"] or found["scaled"]
    while prefix := next((one for one in _PREFIXES if module.startswith(one)), None):
        module = module.removeprefix(prefix)
    return Key(_flat(module), kind)


def _flat(name: str) -> str:
    return name.replace(".", "_")
