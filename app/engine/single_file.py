"""A transformer in one file, in Black Forest Labs' (BFL's) layout: where each of diffusers' parameters lies in it.

BFL joins what diffusers keeps apart (query, key, value, the MLP's input) along the rows. So a parameter is a range of a
tensor's bytes, and a rank reads its slices of it like those of any other. ComfyUI's checkpoints have the same names
behind a prefix, beside the other parts of the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.engine.checkpoint_files import CheckpointError, StoredTensor

if TYPE_CHECKING:
    from diffusers import ModelMixin

PREFIX = "model.diffusion_model."
"""ComfyUI's, of a transformer in a checkpoint with all parts."""

_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_QK_NORM = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

Names = Mapping[str, Sequence[str]]
"""Modules of the file, each with diffusers' modules whose rows it joins, in order."""

_FLUX1: tuple[Names, Names, Names] = (
    {
        **_ENDS,
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    },
    {
        **_ATTENTION,
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    {
        **_QK_NORM,
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
)
_FLUX2: tuple[Names, Names, Names] = (
    {
        **_ENDS,
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
    {
        **_ATTENTION,
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    {**_QK_NORM, "linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
)
_LAYOUTS = {"FluxTransformer2DModel": _FLUX1, "Flux2Transformer2DModel": _FLUX2}
SWAPPED = "final_layer.adaLN_modulation.1"
"""BFL has the final norm's shift before its scale, diffusers the scale before its shift."""
_OTHER_KINDS = {
    "a LoRA": (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lokr_w1", ".hada_w1_a"),
    "a ControlNet": ("controlnet_blocks.", "controlnet_x_embedder."),
}
_REMEDY = "name in `model` the model that the file belongs to"


def diffusers_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], transformer: ModelMixin
) -> dict[str, StoredTensor]:
    """The tensors of the file ``path`` under diffusers' names, in the order of the data; nothing is read for it.

    Args:
        tensors: the file's own, in BFL's layout, or with diffusers' names already.
        transformer: what they belong to, on the meta device.

    Raises:
        CheckpointError: the file is no transformer, or of another model: tensors are missing, unknown or of another
            shape.
    """
    left = _of_the_transformer(path, tensors)
    if "x_embedder.weight" in left:
        return left
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    found: dict[str, StoredTensor] = {}
    missing: list[str] = []
    for module, parts in bfl_modules(transformer):
        for leaf in ("weight", "bias"):
            wanted = [(name, shapes[name]) for part in parts if (name := f"{part}.{leaf}") in shapes]
            if not wanted:  # no bias, or no guidance embedding
                continue
            name = f"{module}.scale" if module.endswith("_norm") else f"{module}.{leaf}"
            if name in left:
                found |= _split(path, name, left.pop(name), wanted)
            else:
                missing.append(name)
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of the transformer, among them {missing[0]}: {_REMEDY}"
        )
    if left:
        raise CheckpointError(
            f"{path} holds the tensor {next(iter(left))!r}, unlike the model's transformer: {_REMEDY}"
        )
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _of_the_transformer(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The transformer's tensors, without the prefix and without what a checkpoint with all parts has beside them."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    own = {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in name for name in own for mark in marks):
            raise CheckpointError(f"{path} is {kind} and not a transformer, which is what is served")
    if not any(name.startswith(("double_blocks.", "transformer_blocks.")) for name in own):
        example = next(iter(own), "none")
        raise CheckpointError(f"{path} holds no FLUX transformer (its first tensor: {example}); name a file with one")
    return own


def bfl_modules(transformer: ModelMixin) -> Iterator[tuple[str, list[str]]]:
    """Each module of the file, and diffusers' modules whose rows it joins."""
    outer, double, single = _LAYOUTS[type(transformer).__name__]
    config: Any = transformer.config
    yield from ((module, list(parts)) for module, parts in outer.items())
    for stack, ours, count, names in (
        ("double_blocks", "transformer_blocks", config.num_layers, double),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, single),
    ):
        for index in range(count):
            for module, parts in names.items():
                yield f"{stack}.{index}.{module}", [f"{ours}.{index}.{part}" for part in parts]


def _split(
    path: Path, name: str, stored: StoredTensor, wanted: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, StoredTensor]:
    """The parameters ``wanted``, names and shapes, that follow each other along the rows of the tensor ``name``."""
    rows = sum(shape[0] for _, shape in wanted)
    expected = (rows, *wanted[0][1][1:])
    if stored.shape != expected:
        fill = "; FLUX.1-Fill, -Canny and -Depth are not served" if name == "img_in.weight" else ""
        raise CheckpointError(
            f"{path}: {name} has shape {stored.shape}, the model's transformer asks for {expected}: {_REMEDY}{fill}"
        )
    found = {}
    offset = stored.offset
    for parameter, shape in wanted:
        swapped = name.startswith(SWAPPED)
        found[parameter] = StoredTensor(shape, stored.dtype, offset, halves_swapped=swapped)
        offset += prod(shape) * stored.dtype.itemsize
    return found
