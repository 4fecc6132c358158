"""Complex rotations against diffusers' real ones; tests/engine/test_parity.py compares whole images."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2AttnProcessor

from app.engine.attention import rotate, rotations, use_rotations, uses_rotations

TEXT, ROWS, COLUMNS = 5, 4, 3
HEADS, CHANNELS = 2, 32


@pytest.fixture
def rotary() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(float(ROWS)), torch.arange(float(COLUMNS)))
    return FluxPosEmbed(theta=10000, axes_dim=[4, 14, 14])(torch.cat([torch.zeros(TEXT, 3), image]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_diffusers(rotary: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    heads = torch.randn(3, TEXT + ROWS * COLUMNS, HEADS, CHANNELS).to(dtype)
    expected = apply_rotary_emb(heads, rotary, sequence_dim=1)
    turned = rotate(heads, rotations(*rotary))
    assert turned.dtype is dtype
    # Sums of two products may be rounded once instead of twice, which moves some values by a unit in the last place.
    torch.testing.assert_close(turned, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(turned, heads)


@pytest.mark.parametrize("text_too", [False, True])
@torch.inference_mode()
def test_attention_is_diffusers(rotary: tuple[torch.Tensor, torch.Tensor], text_too: bool) -> None:
    dim = HEADS * CHANNELS
    attention = FluxAttention(
        query_dim=dim,
        heads=HEADS,
        dim_head=CHANNELS,
        added_kv_proj_dim=dim if text_too else None,
        context_pre_only=None if not text_too else False,
        pre_only=not text_too,
        out_dim=dim,
        bias=True,
        eps=1e-6,
    )
    image = torch.randn(2, ROWS * COLUMNS + (0 if text_too else TEXT), dim)
    text = torch.randn(2, TEXT, dim) if text_too else None
    expected = attention(image, text, image_rotary_emb=rotary)
    use_rotations(attention)
    assert uses_rotations(attention)
    made = attention(image, text, image_rotary_emb=rotations(*rotary))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_other_models_keep_their_attention() -> None:
    other = Flux2Attention(query_dim=HEADS * CHANNELS, heads=HEADS, dim_head=CHANNELS)
    use_rotations(other)
    assert not uses_rotations(other)
    assert isinstance(other.processor, Flux2AttnProcessor)
