"""What a product's kernel does to what it writes, which saves a pass of its own: GELU, a sum with another product.

Measured on an H100, compiled, in bfloat16 (docs/performance.md): two double and two single blocks of FLUX.1-dev take
8.64 ms instead of 8.97 with GELU, although single blocks then make their attention's and MLP's input in two products,
and 8.76 with the output projection as a sum of two products. Both together were not measured.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.nn.functional import linear

from app.engine.fp8 import FLOAT8
from app.engine.fused import QKV_MLP, FusedSingleBlock
from app.engine.parallel import RowParallelLinear, own_bias


def activated(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of ``input`` times ``weight`` and ``bias``: (rows, tokens, in_features) -> (rows, tokens, out_features).

    In its tanh form on CUDA, which is FLUX's; torch takes the exact one on a CPU.
    """
    output: torch.Tensor = torch._addmm_activation(bias, input.flatten(0, 1), weight.T, use_gelu=True)
    return output.view(*input.shape[:-1], -1)


def added(module: nn.Linear, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What ``module`` makes of two parts of its input, as a sum of two products; on a rank, its part of the output.

    Args:
        first, second: (rows, tokens, features of each).
    """
    weight, more = module.weight.tensor_split([first.shape[-1]], dim=1)
    output = torch.addmm(linear(first, weight, own_bias(module)).flatten(0, 1), second.flatten(0, 1), more.T)
    return output.view(*first.shape[:-1], -1)


class ActivatedProduct(GELU):
    """The first half of a double block's MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, dim) -> (rows, tokens, MLP's width)."""
        return activated(hidden_states, self.proj.weight, self.proj.bias)


class ActivatedSingleBlock(FusedSingleBlock):
    """FLUX.1's single block whose MLP has products of its own, in and out."""

    def projected(self, normed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FusedSingleBlock.projected`."""
        fused = getattr(self, QKV_MLP)
        (qkv, mlp), (qkv_bias, mlp_bias) = (one.tensor_split([3 * width]) for one in (fused.weight, fused.bias))
        return linear(normed, qkv, qkv_bias), activated(normed, mlp, mlp_bias)

    def output(self, attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        """See `FusedSingleBlock.output`; without a copy of both side by side, which a compiler cannot avoid here."""
        made = added(self.proj_out, attended, mlp)
        return self.proj_out.group.sum(made) if isinstance(self.proj_out, RowParallelLinear) else made


def join_products(transformer: nn.Module) -> None:
    """Have blocks of FLUX.1 apply GELU within products and add products up, in place, wherever all are plain linears.

    Linears in 8 bits and those that take adapters have further steps in between.
    """
    for module in transformer.modules():
        if type(module) is GELU and module.approximate == "tanh" and type(module.proj) is nn.Linear:
            module.__class__ = ActivatedProduct
        elif type(module) is FusedSingleBlock and _is_plain(getattr(module, QKV_MLP)) and _is_plain(module.proj_out):
            module.__class__ = ActivatedSingleBlock


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, RowParallelLinear) and module.weight.dtype is not FLOAT8
