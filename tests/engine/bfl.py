"""Transformers written in BFL's layout: the inverse of diffusers' conversion, and that conversion, the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def write(state: State, path: Path, prefix: str = "", beside: State | None = None) -> Path:
    """Write the transformer ``state``, in diffusers' names, into a file in BFL's layout, with tensors ``beside`` it."""
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in bfl_of(state).items()} | (beside or {}), path)
    return path


def transformer_of(model: Path) -> State:
    """All tensors of a model's transformer."""
    return {
        name: one for file in (model / "transformer").glob("*.safetensors") for name, one in load_file(file).items()
    }


def bfl_of(state: State) -> State:
    """A FLUX.1 or FLUX.2 transformer's tensors in BFL's names and packing."""
    flux2 = "single_stream_modulation.linear.weight" in state
    made: State = {}

    def put(theirs: str, *ours: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{ours[0]}.{leaf}" in state:
                made[f"{theirs}.{leaf}"] = torch.cat([state[f"{one}.{leaf}"] for one in ours])

    def put_norm(theirs: str, ours: str) -> None:
        made[f"{theirs}.scale"] = state[f"{ours}.weight"]

    time = "time_guidance_embed" if flux2 else "time_text_embed"
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        put(f"{theirs}_in.in_layer", f"{time}.{ours}_embedder.linear_1")
        put(f"{theirs}_in.out_layer", f"{time}.{ours}_embedder.linear_2")
    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        put(f"{name}.lin", f"{name}.linear")
    for index in range(_count(state, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        text_qkv = ("add_q_proj", "add_k_proj", "add_v_proj")
        streams = (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}", "ff", "norm1"),
            ("txt", text_qkv, "to_add_out", "norm_added_{}", "ff_context", "norm1_context"),
        )
        for stream, qkv, out, norm, mlp, modulation in streams:
            put(f"{theirs}.{stream}_attn.qkv", *(f"{ours}.attn.{one}" for one in qkv))
            put(f"{theirs}.{stream}_attn.proj", f"{ours}.attn.{out}")
            put_norm(f"{theirs}.{stream}_attn.norm.query_norm", f"{ours}.attn.{norm.format('q')}")
            put_norm(f"{theirs}.{stream}_attn.norm.key_norm", f"{ours}.attn.{norm.format('k')}")
            put(f"{theirs}.{stream}_mlp.0", f"{ours}.{mlp}.{'linear_in' if flux2 else 'net.0.proj'}")
            put(f"{theirs}.{stream}_mlp.2", f"{ours}.{mlp}.{'linear_out' if flux2 else 'net.2'}")
            put(f"{theirs}.{stream}_mod.lin", f"{ours}.{modulation}.linear")
    for index in range(_count(state, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        if flux2:
            put(f"{theirs}.linear1", f"{ours}.attn.to_qkv_mlp_proj")
            put(f"{theirs}.linear2", f"{ours}.attn.to_out")
        else:
            put(f"{theirs}.linear1", *(f"{ours}.{one}" for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
            put(f"{theirs}.linear2", f"{ours}.proj_out")
            put(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        put_norm(f"{theirs}.norm.query_norm", f"{ours}.attn.norm_q")
        put_norm(f"{theirs}.norm.key_norm", f"{ours}.attn.norm_k")
    put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        if f"norm_out.linear.{leaf}" in state:
            scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
            made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return made


def diffusers_of(path: Path) -> State:
    """What diffusers makes of a file in BFL's layout."""
    state = load_file(path)
    if any("single_stream_modulation" in name for name in state):
        return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(state)
    return _flux1_converter(len(next(one for name, one in state.items() if name.endswith("img_in.bias"))))(state)


def _flux1_converter(dim: int) -> Callable[[State], State]:
    """diffusers' conversion for a transformer of width ``dim``; it has the published model's as a constant."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072\n") == 1
    scope: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072\n", f"inner_dim = {dim}\n"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def _count(state: State, stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
