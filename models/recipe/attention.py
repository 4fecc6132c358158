"""A faster attention for training on a CPU, where the fused kernel's backward takes a third of the whole step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(n, tokens, heads, dim) each, to the same: two batched products with the softmax between them."""
    n, tokens, heads, dim = query.shape
    q, k, v = (x.to(value.dtype).transpose(1, 2).reshape(n * heads, tokens, dim) for x in (query, key, value))
    weights = torch.bmm(q * dim**-0.5, k.transpose(1, 2)).softmax(-1).to(value.dtype)
    return torch.bmm(weights, v).view(n, heads, tokens, dim).transpose(1, 2)


@contextmanager
def fast_attention() -> Iterator[None]:
    """FLUX's attention as `plain` for tensors on a CPU; elsewhere the fused kernels are the faster ones."""
    fused = transformer_flux.dispatch_attention_fn

    def choose(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return plain(query, key, value) if query.device.type == "cpu" else fused(query, key, value, **options)

    with patch.object(transformer_flux, "dispatch_attention_fn", choose):
        yield
