"""Projections that read the same input, as one linear: queries, keys, values and, in single blocks, the MLP's input.

One product reads its input once where three or four read it each; in 8 bits the input is rounded once, too. The rows of
the parts follow one another, so that a rank's fused linear is made of the slices that it has of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2Attention
from torch import nn

QKV, TEXT_QKV, QKV_MLP = "to_qkv", "to_added_qkv", "to_qkv_mlp"
PARTS = {
    QKV: ("to_q", "to_k", "to_v"),
    TEXT_QKV: ("add_q_proj", "add_k_proj", "add_v_proj"),
    QKV_MLP: ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""What each fused linear is made of; the first two names are those of diffusers' attentions."""
FUSED = tuple(PARTS)


@dataclass(frozen=True)
class Slot:
    """Where a parameter of the checkpoint went: rows ``begin`` to ``end`` of the one named ``parameter``."""

    parameter: str
    begin: int
    end: int


class FusedSingleBlock(FluxSingleTransformerBlock):
    """FLUX.1's single block with one projection for attention and MLP."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, image) of the same shapes: image (rows, image_tokens, dim), text (rows, text_tokens, dim)."""
        text_tokens = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(joint, emb=temb)
        # This rank's heads: the rest of the output projection's input is the MLP's.
        width = (getattr(self, QKV_MLP).weight.shape[0] - self.proj_out.in_features) // 2
        qkv, mlp = self.projected(normed, width)
        del normed  # its memory is attention's
        attended = self.attn.processor.attend(self.attn, qkv, None, image_rotary_emb)
        made = joint + gate[:, None] * self.output(attended, mlp)
        if made.dtype is torch.float16:
            made = made.clip(-65504, 65504)
        return made[:, :text_tokens], made[:, text_tokens:]

    def projected(self, normed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, tokens, dim) -> queries, keys and values, (rows, tokens, 3 width), and the activated MLP's input."""
        qkv, mlp = getattr(self, QKV_MLP)(normed).tensor_split([3 * width], dim=-1)
        return qkv, self.act_mlp(mlp)

    def output(self, attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        """This rank's parts of attention and MLP, (rows, tokens, width of each) -> (rows, tokens, dim) of all ranks."""
        made: torch.Tensor = self.proj_out(torch.cat([attended, mlp], dim=2))
        return made


def fuse(model: nn.Module) -> dict[str, Slot]:
    """Fuse the projections of all blocks of ``model``, in place; where each parameter that went into one is now.

    Single blocks of FLUX.1 need the engine's attention from then on (`app.engine.attention.use_positions`).

    On the meta device this takes no memory, and what reads the checkpoint fills the slots; elsewhere values are copied.
    """
    slots: dict[str, Slot] = {}
    for name, module in list(model.named_modules()):  # blocks come before their attentions
        prefix = f"{name}." if name else ""
        if isinstance(module, FluxSingleTransformerBlock):
            slots |= _join(module, prefix, QKV_MLP)
            module.__class__ = FusedSingleBlock
        elif isinstance(module, FluxAttention | Flux2Attention) and hasattr(module, "to_q"):
            slots |= _join(module, prefix, QKV)
            if module.added_kv_proj_dim is not None:
                slots |= _join(module, prefix, TEXT_QKV)
            module.fused_projections = True
    return slots


def _join(owner: nn.Module, prefix: str, name: str) -> dict[str, Slot]:
    """Put the linear ``name`` in place of its parts in ``owner``, whose parameters' names begin with ``prefix``."""
    parts: list[Any] = [owner.get_submodule(part) for part in PARTS[name]]
    biased = parts[0].bias is not None
    fused = nn.Linear(parts[0].in_features, sum(len(part.weight) for part in parts), biased, device="meta")
    slots = {}
    for leaf in ("weight", "bias") if biased else ("weight",):
        values = [getattr(part, leaf) for part in parts]
        setattr(fused, leaf, nn.Parameter(torch.cat(values), requires_grad=False))
        end = 0
        for part, value in zip(PARTS[name], values, strict=True):
            begin, end = end, end + len(value)
            slots[f"{prefix}{part}.{leaf}"] = Slot(f"{prefix}{name}.{leaf}", begin, end)
    for part in PARTS[name]:
        inner, _, child = part.rpartition(".")
        delattr(owner.get_submodule(inner), child)
    setattr(owner, name, fused)
    return slots
