"""The names of adapters' tensors: the layouts are told apart by name alone, and what is no plain LoRA is said to be."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

from app.engine.lora_names import Key, LoraError, parse, targets
from tests.engine.lora_cases import flux_tiny

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


@pytest.mark.parametrize(
    ("key", "module", "kind"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks_0_attn_to_q", "down"),
        ("transformer_blocks.0.attn.to_q.lora_B.default.weight", "transformer_blocks_0_attn_to_q", "up"),
        ("base_model.model.x_embedder.lora_B.weight", "x_embedder", "up"),
        ("transformer.x_embedder.alpha", "x_embedder", "alpha"),
        ("transformer.proj_out.lora.down.weight", "proj_out", "down"),
        ("diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight", "double_blocks_1_img_attn_qkv", "down"),
        ("base_model.model.single_blocks.2.linear1.lora_B.weight", "single_blocks_2_linear1", "up"),
        ("lora_unet_double_blocks_0_txt_mlp_0.lora_up.weight", "double_blocks_0_txt_mlp_0", "up"),
        ("lora_unet_single_blocks_0_linear2.alpha", "single_blocks_0_linear2", "alpha"),
        ("lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight", "transformer_blocks_0_attn_to_q", "down"),
    ],
)
def test_keys_of_all_layouts_name_a_module(key: str, module: str, kind: str) -> None:
    assert parse(key) == Key(module, kind)
    assert kind == "alpha" or "blocks_1" in module or "blocks_2" in module or module in targets(flux_tiny())


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_k.alpha",
        "text_encoders.t5xxl.transformer.encoder.block.0.lora_down.weight",
    ],
)
def test_parts_of_text_encoders_are_known_as_such(key: str) -> None:
    assert parse(key) is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("transformer.x_embedder.dora_scale", "is a DoRA"),
        ("transformer.x_embedder.lora_magnitude_vector.weight", "is a DoRA"),
        ("diffusion_model.img_in.lokr_w1", "is a LoKr"),
        ("lora_unet_img_in.hada_w1_a", "is a LoHa"),
        ("lora_unet_img_in.diff_b", "full differences"),
        ("transformer.x_embedder.lora_B.bias", "changes biases"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "is a control LoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "no part of a LoRA in diffusers', BFL's or kohya's layout"),
        ("x_embedder.weight", "no part of a LoRA"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(LoraError, match=reason):
        parse(key)


def test_joint_modules_name_their_parts_in_order() -> None:
    known = targets(flux_tiny())
    joint = known["single_blocks_3_linear1"]
    parts = (*(f"single_transformer_blocks.3.{part}" for part in QKV), "single_transformer_blocks.3.proj_mlp")
    assert joint.inputs == 192
    assert joint.outputs == dict(zip(parts, (192, 192, 192, 768), strict=True))
    assert known["final_layer_adaLN_modulation_1"].halves_swapped
    assert not known["norm_out_linear"].halves_swapped


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, Flux2Transformer2DModel])
def test_every_linear_has_a_name_in_both_layouts(kind: type) -> None:
    with torch.device("meta"):
        whole = kind(num_layers=1, num_single_layers=1)
    names = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    known = targets(whole)
    assert {name for name in known if name.replace("_", "") in {one.replace(".", "").replace("_", "") for one in names}}
    in_bfl = {
        linear
        for name, target in known.items()
        if not name.startswith(("transformer", "single_t"))
        for linear in target.outputs
    }
    assert in_bfl == names
