"""The engine's attention for FLUX.1 and FLUX.2: rotary embeddings as complex products, tokens shared among ranks.

A rotary embedding turns each pair of a head's channels by an angle. With real numbers, as in diffusers, that takes
seven passes over all queries and keys and a copy of each with swapped pairs; with complex numbers, as which the pairs
can be viewed, it takes one. Results differ in rounding: a sum of two products may be rounded once instead of twice.
The compiler fuses the real form by itself, and has no code for complex numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from torch import nn

from app.engine.sequence import SequenceParallelGroup


class Positions(NamedTuple):
    """What the engine's attention takes as ``image_rotary_emb``.

    Attributes:
        rotary: of this rank's tokens: diffusers' cosines and sines, each (tokens, head_dim), or `rotations`.
        sizes: tokens of every rank; empty when each rank has all.
    """

    rotary: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    sizes: tuple[int, ...] = ()

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Apply the rotary embedding to (rows, tokens, heads, head_dim)."""
        if isinstance(self.rotary, torch.Tensor):
            return rotate(heads, self.rotary)
        turned: torch.Tensor = apply_rotary_emb(heads, self.rotary, sequence_dim=1)
        return turned


class _Processor:
    # Read and set by diffusers, whose attention modules have a processor of this kind each.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __init__(self, group: SequenceParallelGroup, complex_rotary: bool) -> None:
        self._group = group
        self.complex_rotary = complex_rotary

    def attend(
        self, attn: Any, qkv: torch.Tensor, text_qkv: torch.Tensor | None, positions: Positions | None
    ) -> torch.Tensor:
        """(rows, tokens, 3 local dim) of image and perhaps text -> (rows, all tokens, local dim), text first."""
        assert positions is not None, "the engine gives every block the positions"
        query, key, value = _heads(attn, qkv)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if text_qkv is not None:
            text_query, text_key, text_value = _heads(attn, text_qkv)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query, key = positions.turn(query), positions.turn(key)
        attention = partial(dispatch_attention_fn, backend=self._attention_backend)
        if self._group.size == 1:
            attended: torch.Tensor = attention(query, key, value)
            return attended.flatten(2, 3)
        return self._group.attend(query, key, value, positions.sizes, attention).flatten(2, 3)


class JointAttnProcessor(_Processor):
    """Attention of double blocks, and of FLUX.1's, whose projections of a stream are one (`app.engine.fused`)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Positions | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Inputs and outputs are (rows, tokens, dim)."""
        if encoder_hidden_states is None:
            return self.attend(attn, attn.to_qkv(hidden_states), None, image_rotary_emb)
        text_qkv = attn.to_added_qkv(encoder_hidden_states)
        attended = self.attend(attn, attn.to_qkv(hidden_states), text_qkv, image_rotary_emb)
        text, image = attended.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        # The second module of to_out is a dropout, inactive in inference.
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


class ParallelAttnProcessor(_Processor):
    """Attention of FLUX.2's single blocks, whose projections are the feed-forward layer's as well."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Positions | None = None,
    ) -> torch.Tensor:
        """(rows, tokens, dim) -> (rows, tokens, dim)."""
        projected = attn.to_qkv_mlp_proj(hidden_states)
        of_attention, of_mlp = 3 * attn.inner_dim, attn.mlp_mult_factor * attn.mlp_hidden_dim
        # A rank of a tensor-parallel group has its share of both, so they stand in the same ratio.
        split = projected.shape[-1] * of_attention // (of_attention + of_mlp)
        attended = self.attend(attn, projected[..., :split], None, image_rotary_emb)
        output: torch.Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(projected[..., split:])], dim=-1))
        return output


def use_positions(transformer: nn.Module, group: SequenceParallelGroup, complex_rotary: bool) -> None:
    """Make every attention in ``transformer`` take `Positions`, with `rotations` in them if ``complex_rotary``."""
    for attention in _attentions(transformer):
        parallel = isinstance(attention, Flux2ParallelSelfAttention)
        attention.set_processor((ParallelAttnProcessor if parallel else JointAttnProcessor)(group, complex_rotary))


def positions(
    transformer: nn.Module, rotary: tuple[torch.Tensor, torch.Tensor], sizes: tuple[int, ...]
) -> Positions | tuple[torch.Tensor, torch.Tensor]:
    """``rotary``, diffusers' embedding, in the form that ``transformer`` takes."""
    processor = next(_attentions(transformer)).processor
    if not isinstance(processor, _Processor):
        return rotary
    return Positions(rotations(*rotary) if processor.complex_rotary else rotary, sizes)


def rotations(cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Positions as (tokens, 1, head_dim / 2) complex64, from diffusers' embedding: both (tokens, head_dim).

    The two channels of a pair have the same angle.
    """
    return torch.complex(cosine[:, ::2], sine[:, ::2])[:, None]


def rotate(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn (rows, tokens, heads, head_dim) by `rotations`; always computed in float32."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    turned: torch.Tensor = torch.view_as_real(pairs * turns).flatten(-2).to(heads.dtype)
    return turned


def _attentions(transformer: nn.Module) -> Iterator[Any]:
    kinds = FluxAttention, Flux2Attention, Flux2ParallelSelfAttention
    return (module for module in transformer.modules() if isinstance(module, kinds))


def _heads(attn: Any, qkv: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values, each (rows, tokens, heads, head_dim) with as many heads as this rank has."""
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1)]
