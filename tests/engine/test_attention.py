"""Complex rotations against diffusers' real ones; tests/engine/test_parity.py compares whole images."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention

from app.engine.attention import Positions, positions, rotate, rotations, use_positions
from app.engine.fused import fuse
from app.engine.sequence import SequenceParallelGroup

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


SIZES = {"query_dim": HEADS * CHANNELS, "heads": HEADS, "dim_head": CHANNELS, "out_dim": HEADS * CHANNELS}
WITH_TEXT = {"added_kv_proj_dim": HEADS * CHANNELS}
ATTENTIONS = {
    "FLUX.1, double": (FluxAttention, {**WITH_TEXT, "context_pre_only": False, "bias": True, "eps": 1e-6}),
    "FLUX.1, single": (FluxAttention, {"pre_only": True, "bias": True, "eps": 1e-6}),
    "FLUX.2, double": (Flux2Attention, WITH_TEXT),
    "FLUX.2, single": (Flux2ParallelSelfAttention, {}),
}


@pytest.mark.parametrize("complex_rotary", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
@torch.inference_mode()
def test_attention_is_diffusers(rotary: tuple[torch.Tensor, torch.Tensor], name: str, complex_rotary: bool) -> None:
    kind, arguments = ATTENTIONS[name]
    attention = kind(**SIZES, **arguments)
    with_text = "added_kv_proj_dim" in arguments
    image = torch.randn(2, ROWS * COLUMNS + (0 if with_text else TEXT), HEADS * CHANNELS)
    text = (torch.randn(2, TEXT, HEADS * CHANNELS),) if with_text else ()
    assert positions(attention, rotary, (1,)) is rotary, "diffusers' own processor takes its embedding as it is"
    expected = attention(image, *text, image_rotary_emb=rotary)
    fuse(attention)
    use_positions(attention, SequenceParallelGroup(), complex_rotary)
    placed = positions(attention, rotary, (1,))
    assert isinstance(placed, Positions)
    assert isinstance(placed.rotary, torch.Tensor) == complex_rotary
    made = attention(image, *text, image_rotary_emb=placed)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
