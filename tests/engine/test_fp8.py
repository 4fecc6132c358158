"""Linears in 8-bit floating point against those that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.engine.fp8 import quantize, to_float8
from app.engine.parallel import RowParallelLinear, TensorParallelGroup


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).to(dtype)
    tokens = torch.randn(2, 5, 64, dtype=dtype) * torch.logspace(-6, 3, 5, dtype=dtype)[:, None]
    tokens[0, 0] = 0
    expected = layer(tokens).float()
    quantize(layer)
    with torch.no_grad():
        made = layer(tokens)
    assert made.dtype is dtype
    assert ((made.float() - expected).norm(dim=-1) <= 0.06 * expected.norm(dim=-1)).all()


def test_float8_keeps_each_row_to_scale() -> None:
    matrix = torch.randn(8, 32) * torch.logspace(-8, 8, 8)[:, None]
    rounded, scale = to_float8(matrix)
    assert ((rounded.float() * scale - matrix).norm(dim=1) <= 0.04 * matrix.norm(dim=1)).all()


def test_a_row_sharded_linear_keeps_its_sum() -> None:
    layer = nn.Linear(32, 16)
    layer.__class__ = RowParallelLinear
    layer.group = TensorParallelGroup()
    tokens = torch.randn(3, 32)
    expected = layer(tokens)
    quantize(layer)
    assert type(layer) is RowParallelLinear
    assert (layer(tokens) - expected).norm() <= 0.06 * expected.norm()


def test_fp8_wants_aligned_shards() -> None:
    with pytest.raises(ValueError, match=r"multiples of 16, and a shard of this model has \(24, 16\)"):
        quantize(nn.Linear(16, 24))
