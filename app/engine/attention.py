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

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: Positions | None
    ) -> torch.Tensor:
        """(rows, tokens, heads, head_dim) each -> (rows, tokens, heads * head_dim)."""
        assert positions is not None, "the engine gives every block the positions"
        query, key = positions.turn(query), positions.turn(key)
        attention = partial(dispatch_attention_fn, backend=self._attention_backend)
        if self._group.size == 1:
            attended: torch.Tensor = attention(query, key, value)
            return attended.flatten(2, 3)
        return self._group.attend(query, key, value, positions.sizes, attention).flatten(2, 3)


class JointAttnProcessor(_Processor):
    """Attention of FLUX.1's blocks and of FLUX.2's double blocks: within image tokens, or jointly with text tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Positions | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Inputs and outputs are (rows, tokens, dim)."""
        query, key, value = (_heads(attn, project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            of_text = [_heads(attn, project(encoder_hidden_states)) for project in projections]
            query = torch.cat([attn.norm_added_q(of_text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(of_text[1]), key], dim=1)
            value = torch.cat([of_text[2], value], dim=1)
        attended = self._attend(query, key, value, image_rotary_emb)
        if encoder_hidden_states is None:
            return attended
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
        query, key, value = (_heads(attn, part) for part in projected[..., :split].chunk(3, dim=-1))
        attended = self._attend(attn.norm_q(query), attn.norm_k(key), value, image_rotary_emb)
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


def _heads(attn: Any, projected: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, dim) -> (rows, tokens, heads, head_dim), with as many heads as this rank has."""
    split: torch.Tensor = projected.unflatten(-1, (-1, attn.head_dim))
    return split
