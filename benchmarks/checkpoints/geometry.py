"""The published configuration of each model's parts, and the same at smaller scales.

What isn't named here is the default of the part's own class, which for these classes is FLUX's value. At 1/8 scale a
model has about an eighth of the parameters: half the heads at the same head size, and half the layers. At tiny scale
it runs in a test; six heads let tensor parallelism of 2 and of 3 divide them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["full", "1/8", "tiny"]
SCALES: tuple[Scale, ...] = ("full", "1/8", "tiny")

FLUX1_TRANSFORMER: Mapping[Scale, dict[str, Any]] = {
    "full": {},
    "1/8": {"num_layers": 10, "num_single_layers": 19, "num_attention_heads": 12, "joint_attention_dim": 2048}
    | {"pooled_projection_dim": 384},
    "tiny": {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 6, "attention_head_dim": 16}
    | {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": 64, "pooled_projection_dim": 32},
}

FLUX2_TRANSFORMER: Mapping[Scale, dict[str, Any]] = {
    "full": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "1/8": {"num_layers": 3, "num_single_layers": 10, "num_attention_heads": 12, "joint_attention_dim": 3840},
    "tiny": {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 6, "joint_attention_dim": 96}
    | {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
}

# openai/clip-vit-large-patch14's text half. Its file says 2 for the end token, from before transformers minded it.
CLIP: Mapping[Scale, dict[str, Any]] = {
    "full": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1/8": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}

# google/t5-v1_1-xxl's encoder.
T5: Mapping[Scale, dict[str, Any]] = {
    "full": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
    "1/8": {"d_model": 2048, "d_ff": 5120, "num_layers": 12, "num_heads": 32, "d_kv": 64},
    "tiny": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16},
}

# Qwen/Qwen3-4B. FLUX.2-klein's prompt embedding is the hidden states after layers 9, 18 and 27: smaller ones can't have
# fewer than 28 layers.
QWEN3: Mapping[Scale, dict[str, Any]] = {
    "full": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128},
    "1/8": {"hidden_size": 1280, "intermediate_size": 4864, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "head_dim": 128},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 8},
}

VAE: Mapping[Scale, dict[str, Any]] = {
    "full": {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2},
    "1/8": {"block_out_channels": (64, 128, 192, 192), "norm_num_groups": 32, "layers_per_block": 2},
    "tiny": {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "layers_per_block": 1},
}

DEV_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL_SCHEDULER = DEV_SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}
KLEIN_SCHEDULER = DEV_SCHEDULER | {"time_shift_type": "exponential"}

FLUX1_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Part:
    """One component with weights.

    Attributes:
        library, class_name: as in ``model_index.json``.
        config: arguments of the class (diffusers) or of its configuration class (transformers).
        weights: stem of the weights' file names.
        shard_bytes: largest size of one file, as the published repositories were split.
        prefix: what the published names of the tensors begin with and the installed class's no longer do.
    """

    library: Literal["diffusers", "transformers"]
    class_name: str
    config: Mapping[str, Any]
    weights: str
    shard_bytes: int
    prefix: str = ""


@dataclass(frozen=True)
class Repository:
    """One model as its repository lays it out.

    Attributes:
        pipeline: the class in ``model_index.json``.
        parts: components with weights, by folder.
        tokenizers: folder and the class in ``model_index.json``.
        extra: further entries of ``model_index.json``.
    """

    pipeline: str
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str]
    scheduler: Mapping[str, Any]
    extra: Mapping[str, Any]


# At full scale what diffusers (10 GB) and transformers (5 GB) split at when the weights were published; smaller scales
# are split into the same number of files.
_TRANSFORMER_BYTES: Mapping[Scale, int] = {"full": 10**10, "1/8": 13 * 10**8, "tiny": 10**6}
_T5_BYTES: Mapping[Scale, int] = {"full": 5 * 10**9, "1/8": 7 * 10**8, "tiny": 42 * 10**5}
_QWEN3_BYTES: Mapping[Scale, int] = {"full": 5 * 10**9, "1/8": 10**9, "tiny": 10**7}
_ABSENT = {"feature_extractor": [None, None], "image_encoder": [None, None]}


def _flux1(
    scale: Scale, pipeline: str, scheduler: Mapping[str, Any], guidance: bool, extra: Mapping[str, Any]
) -> Repository:
    clip = CLIP[scale] | {"projection_dim": 768, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    t5 = T5[scale] | {
        "num_decoder_layers": T5[scale]["num_layers"],
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    }
    t5 |= {"tie_word_embeddings": False, "is_encoder_decoder": False, "use_cache": False}
    return Repository(
        pipeline=pipeline,
        parts={
            "transformer": Part(
                "diffusers",
                "FluxTransformer2DModel",
                FLUX1_TRANSFORMER[scale] | {"guidance_embeds": guidance},
                "diffusion_pytorch_model",
                _TRANSFORMER_BYTES[scale],
            ),
            "vae": Part("diffusers", "AutoencoderKL", FLUX1_VAE | VAE[scale], "diffusion_pytorch_model", 10**10),
            "text_encoder": Part("transformers", "CLIPTextModel", clip, "model", 5 * 10**9, "text_model."),
            "text_encoder_2": Part("transformers", "T5EncoderModel", t5, "model", _T5_BYTES[scale]),
        },
        tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"},
        scheduler=scheduler,
        extra=extra,
    )


def _klein(scale: Scale) -> Repository:
    qwen3 = QWEN3[scale] | {
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "max_window_layers": QWEN3[scale]["num_hidden_layers"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return Repository(
        pipeline="Flux2KleinPipeline",
        parts={
            "transformer": Part(
                "diffusers",
                "Flux2Transformer2DModel",
                FLUX2_TRANSFORMER[scale] | {"guidance_embeds": False},
                "diffusion_pytorch_model",
                10**10,
            ),
            "vae": Part("diffusers", "AutoencoderKLFlux2", VAE[scale], "diffusion_pytorch_model", 10**10),
            "text_encoder": Part("transformers", "Qwen3ForCausalLM", qwen3, "model", _QWEN3_BYTES[scale]),
        },
        tokenizers={"tokenizer": "Qwen2TokenizerFast"},
        scheduler=KLEIN_SCHEDULER,
        extra={"is_distilled": True},
    )


def repository(model: str, scale: Scale) -> Repository:
    """The parts of ``model`` at ``scale``.

    Raises:
        ValueError: no such model or scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is unknown; there are {', '.join(SCALES)}")
    if model == "flux.1-dev":
        return _flux1(scale, "FluxPipeline", DEV_SCHEDULER, True, {})
    if model == "flux.1-schnell":
        return _flux1(scale, "FluxPipeline", SCHNELL_SCHEDULER, False, {})
    if model == "flux.1-kontext-dev":
        return _flux1(scale, "FluxKontextPipeline", DEV_SCHEDULER, True, _ABSENT)
    if model == "flux.2-klein-4b":
        return _klein(scale)
    raise ValueError(f"model {model!r} is unknown; there are {', '.join(MODELS)}")


MODELS = ("flux.1-dev", "flux.1-schnell", "flux.1-kontext-dev", "flux.2-klein-4b")
