"""Linears in 8-bit floating point: weights have a scale per output, activations one per token.

Both operands of the product are float8 (e4m3), which GPUs from compute capability 8.9 multiply at twice the rate of
bfloat16, and the weights take half of its memory. The matrix units may sum products with fewer bits than float32 has
(``use_fast_accum``). Scaling the activations is left to the compiler to fuse: without one, each of its operators reads
and writes them all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import linear

Quantization = Literal["fp8"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
ALIGNMENT = 16
"""The matrix units take matrices whose sides are multiples of this."""
MIN_CAPABILITY = (8, 9)


class Fp8Linear(nn.Linear):
    """A linear whose weight is (out_features, in_features) in float8 with ``scale``, (out_features, 1), float32."""

    scale: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype."""
        return product(self, input, self.bias)


def product(module: nn.Linear, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``input`` times the weight of ``module``, and ``bias``, whether the weight is in float8 or not."""
    output: torch.Tensor
    if module.weight.dtype is not FLOAT8:
        output = linear(input, module.weight, bias)
        return output
    tokens, token_scale = to_float8(input.flatten(0, -2))
    # The public form of it, torch.nn.functional.scaled_mm, cannot be compiled in torch 2.11.
    output = torch._scaled_mm(
        tokens,
        module.weight.T,
        token_scale,
        module.scale.T,  # type: ignore[arg-type]
        out_dtype=input.dtype,
        use_fast_accum=True,
    )
    output = output.view(*input.shape[:-1], -1)
    return output if bias is None else output + bias


def to_float8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``matrix``, (rows, columns), in float8, and a scale for each row, (rows, 1), float32."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / LARGEST
    return (matrix / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8), scale


def quantize(module: nn.Linear) -> None:
    """Store the weight of ``module`` in float8, in place; a row-sharded linear keeps its class and its all-reduce.

    Raises:
        ValueError: a side is not a multiple of 16, or the GPU has no float8.
    """
    device = module.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise ValueError(
            "quantization fp8 needs a GPU of compute capability 8.9 or later, and this one is a "
            f"{torch.cuda.get_device_name(device)}: leave quantization out"
        )
    if any(side % ALIGNMENT for side in module.weight.shape):
        raise ValueError(
            f"quantization fp8 needs sides that are multiples of {ALIGNMENT}, and a shard of this model has "
            f"{tuple(module.weight.shape)}: lower tensor_parallel_size, or leave quantization out"
        )
    weight, scale = to_float8(module.weight.detach())
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.register_buffer("scale", scale, persistent=False)
    if type(module) is nn.Linear:
        module.__class__ = Fp8Linear
