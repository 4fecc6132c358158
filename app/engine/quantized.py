"""Weights that were quantized before they were saved: recognised and refused, by configuration, type or tensor name.

Their numbers mean something only together with scales, which each method stores in a way of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

REMEDY = "use the unquantized weights (bfloat16), which the setting `quantization: fp8` quantizes as they are read"
TYPES = frozenset({"I4", "U4", "I8", "U8", "I32", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
"""safetensors' names of types that only quantized weights have: packed integers, block scales."""

_KEYS = ("quantization_config", "compression_config", "quantization")
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
_METHODS = (  # by the last part of a tensor's name
    ("scaled fp8", re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input)$")),
    ("scaled fp8 or fp4 (modelopt)", re.compile(r"(^|\.)(weight_scale(_\d|_inv)?|input_scale|_amax)$")),
    ("ComfyUI's quantization", re.compile(r"(^|\.)comfy_quant$")),
    ("bitsandbytes", re.compile(r"(\.(nested_)?absmax|\.quant_map|\.quant_state\..*|\.SCB)$")),
    ("svdquant (nunchaku)", re.compile(r"\.(wscales|wcscales|wtscale|smooth_orig|smooth_factor)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("quanto", re.compile(r"\.weight\._(data|scale)$")),
    ("torchao", re.compile(r"\._weight_(qdata|scale)$")),
)


def method_of_config(config: Mapping[str, Any]) -> str | None:
    """The method's name in a component's configuration, None when it has none."""
    for key in _KEYS:
        entry = config.get(key)
        if not entry:
            continue
        if not isinstance(entry, Mapping):
            return str(entry)
        if any(entry.get(name) for name in _BITSANDBYTES) and "quant_method" not in entry:
            return "bitsandbytes"
        return str(entry.get("quant_method") or entry.get("quant_type") or "a method that it does not name")
    return None


def method_of_tensors(names: Iterable[str]) -> str | None:
    """The method whose scales are among tensors of these ``names``, None for weights that are not quantized."""
    for name in names:
        for method, pattern in _METHODS:
            if pattern.search(name):
                return f"{method}, as {name!r} shows"
    return None
