"""GELU in the product before it: on a GPU the library's kernel applies it to what it writes, one pass less.

Measured on an H100, compiled, in bfloat16 (docs/performance.md): two double and two single blocks of FLUX.1-dev take
8.64 ms instead of 8.97, although single blocks then make their attention's and MLP's input in two products.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.nn.functional import linear

from app.engine.fused import QKV_MLP, FusedSingleBlock


def activated(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of ``input`` times ``weight`` and ``bias``: (rows, tokens, in_features) -> (rows, tokens, out_features).

    In its tanh form on CUDA, which is FLUX's; torch takes the exact one on a CPU.
    """
    output: torch.Tensor = torch._addmm_activation(bias, input.flatten(0, 1), weight.T, use_gelu=True)
    return output.view(*input.shape[:-1], -1)


class ActivatedProduct(GELU):
    """The first half of a double block's MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, dim) -> (rows, tokens, MLP's width)."""
        return activated(hidden_states, self.proj.weight, self.proj.bias)


class ActivatedSingleBlock(FusedSingleBlock):
    """FLUX.1's single block whose MLP has a product of its own."""

    def projected(self, normed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FusedSingleBlock.projected`."""
        fused = getattr(self, QKV_MLP)
        (qkv, mlp), (qkv_bias, mlp_bias) = (one.tensor_split([3 * width]) for one in (fused.weight, fused.bias))
        return linear(normed, qkv, qkv_bias), activated(normed, mlp, mlp_bias)


def put_gelu_into_products(transformer: nn.Module) -> None:
    """Have blocks of FLUX.1 apply GELU within the product before it, in place, wherever that is a plain linear.

    Linears in 8 bits and those that take adapters have further steps in between.
    """
    for module in transformer.modules():
        if type(module) is GELU and module.approximate == "tanh" and type(module.proj) is nn.Linear:
            module.__class__ = ActivatedProduct
        elif type(module) is FusedSingleBlock and type(getattr(module, QKV_MLP)) is nn.Linear:
            module.__class__ = ActivatedSingleBlock
