"""Weights that another program quantized are refused by the method's name, whatever shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from app.engine.quantized import method_of_config, method_of_tensors
from tests.engine.damage import WEIGHTS, copy_of_flux_tiny, edit

REMEDY = r"use the unquantized weights \(bfloat16\), which the setting `quantization: fp8`"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of_flux_tiny(tmp_path / "model")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gguf", "compute_dtype": "bfloat16"}}, "gguf"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}, "torchao"),
        ({"quantization_config": {"quant_method": "quanto", "weights_dtype": "int8"}}, "quanto"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_type": "FP8"}}, "modelopt"),
        ({"quantization_config": {"quant_method": "svdquant"}}, "svdquant"),
        ({"quantization_config": {"quant_method": "sdnq"}}, "sdnq"),
        ({"quantization_config": {"bits": 4}}, "a method that it does not name"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_a_quantization_config_is_refused_by_its_method(model: Path, part: str, config: dict, method: str) -> None:
    edit(model / part / "config.json", **config)
    with pytest.raises(
        CheckpointError,
        match=rf"{part}/config\.json: the weights are quantized by {method}, which is not read: {REMEDY}",
    ):
        check_checkpoint(model, 1)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_an_absent_one_is_none(config: dict) -> None:
    assert method_of_config(config) is None


@pytest.mark.parametrize(
    ("added", "method"),
    [
        ("scaled_fp8", "scaled fp8"),
        ("{}.scale_weight", "scaled fp8"),
        ("{}.weight_scale", r"scaled fp8 or fp4 \(modelopt\)"),
        ("{}.input_scale", r"scaled fp8 or fp4 \(modelopt\)"),
        ("{}.comfy_quant", "ComfyUI's quantization"),
        ("{}.weight.absmax", "bitsandbytes"),
        ("{}.SCB", "bitsandbytes"),
        ("{}.wscales", r"svdquant \(nunchaku\)"),
        ("{}.qzeros", "GPTQ or AWQ"),
        ("{}.weight._scale", "quanto"),
    ],
)
@pytest.mark.parametrize(
    ("file", "layer"),
    [(f"transformer/{WEIGHTS}", "x_embedder"), ("text_encoder_2/model.safetensors", "encoder.block.0.layer.0.q")],
)
def test_scales_beside_the_weights_are_refused(model: Path, file: str, layer: str, added: str, method: str) -> None:
    path = model / file
    save_file(load_file(path) | {added.format(layer): torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=rf"{file}: the weights are quantized \({method}, as .+{REMEDY}"):
        check_checkpoint(model, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_packed_integers_are_refused(model: Path, dtype: torch.dtype) -> None:
    path = model / "transformer" / WEIGHTS
    save_file(load_file(path) | {"x_embedder.weight": torch.zeros(192, 64, dtype=dtype)}, path)
    with pytest.raises(
        CheckpointError, match=rf"x_embedder\.weight is of type [IU]\d+; read are .+ quantized, {REMEDY}"
    ):
        check_checkpoint(model, 1)


def test_the_scales_of_norms_are_no_sign() -> None:
    names = ["double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.norm.key_norm.scale", "proj_out.weight"]
    assert method_of_tensors(names) is None
