"""FLUX.1's attention with rotary embeddings applied as complex products.

A rotary embedding turns each pair of a head's channels by an angle. With real numbers, as in diffusers, that takes
seven passes over all queries and keys and a copy of each with swapped pairs; with complex numbers, as which the pairs
can be viewed, it takes one. Results differ in rounding: a sum of two products may be rounded once instead of twice.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn


class RotatingAttnProcessor(FluxAttnProcessor):
    """Like its base class, but ``image_rotary_emb`` are `rotations`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend within image tokens, or jointly with text tokens; inputs and outputs are (rows, tokens, dim)."""
        assert image_rotary_emb is not None, "the engine gives every block the positions"
        query, key, value = (_heads(attn, project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            of_text = [_heads(attn, project(encoder_hidden_states)) for project in projections]
            query = torch.cat([attn.norm_added_q(of_text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(of_text[1]), key], dim=1)
            value = torch.cat([of_text[2], value], dim=1)
        attended: torch.Tensor = dispatch_attention_fn(
            rotate(query, image_rotary_emb),
            rotate(key, image_rotary_emb),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        # The second module of to_out is a dropout, inactive in inference.
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


def use_rotations(transformer: nn.Module) -> None:
    """Make every FLUX.1 attention in ``transformer`` take `rotations`; those of other models are left as they are."""
    for attention in _attentions(transformer):
        attention.set_processor(RotatingAttnProcessor())


def uses_rotations(transformer: nn.Module) -> bool:
    """Whether the attentions in ``transformer`` take `rotations` instead of the output of diffusers' embedding."""
    return any(isinstance(attention.processor, RotatingAttnProcessor) for attention in _attentions(transformer))


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


def _attentions(transformer: nn.Module) -> list[FluxAttention]:
    return [module for module in transformer.modules() if isinstance(module, FluxAttention)]


def _heads(attn: Any, projected: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, dim) -> (rows, tokens, heads, head_dim), with as many heads as this rank has."""
    split: torch.Tensor = projected.unflatten(-1, (-1, attn.head_dim))
    return split
