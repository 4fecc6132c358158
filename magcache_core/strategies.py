"""Strategies: how the blocks of a model class pass their streams, its curve, and how its forward splits into parts.

Diffusers' models are used by attribute only, so this module imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from magcache_core.profile_store import load_profile

Embedded = torch.Tensor | tuple[torch.Tensor, ...]
"""What modulates the blocks, (rows, dim); or one tensor per block."""
Rotary = Any
"""Positions for the blocks: diffusers' cosines and sines, each (text_tokens + image_tokens, head_dim), or the form that
a custom attention processor takes."""


class ResidualError(RuntimeError):
    """A residual doesn't fit the tensor that it belongs to; the message has both shapes, dtypes and devices."""

    def __init__(self, what: str, residual: torch.Tensor, hidden: torch.Tensor) -> None:
        super().__init__(f"{what}: {_describe(residual)} does not fit {_describe(hidden)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


@dataclass(frozen=True)
class BlockMetadata:
    """How a transformer block takes and returns its streams.

    Attributes:
        hidden_index: position of the image stream in the returned tuple; None when the block returns one tensor.
        context_index: position of the text stream, or None when it isn't returned.
        hidden_name: keyword of the image stream; it may also be passed by position.
        context_name: keyword of the text stream.
    """

    hidden_index: int | None = None
    context_index: int | None = None
    hidden_name: str = "hidden_states"
    context_name: str = "encoder_hidden_states"


class MagCacheStrategy:
    """One model class. The defaults suit a stack that maps (rows, image_tokens, dim) to the same shape.

    To add a model, override what differs and `register_strategy` it. The methods from `embed_image` on split the
    forward into parts; only callers that run the parts themselves, such as a tensor-parallel engine, need them.
    """

    profile_name: str | None = None
    """Name of a shipped profile with this class's curve, where there is one."""

    @property
    def mag_ratios(self) -> Any:
        """The magnitude-ratio curve of the class's best known model (numbers or a tensor); None: calibrate it."""
        return None if self.profile_name is None else load_profile(self.profile_name).ratios

    def register_block_metadata(self, block_class: type) -> Any:
        """How blocks of ``block_class`` pass their streams: `BlockMetadata` or diffusers' ``TransformerBlockMetadata``.

        None leaves it to diffusers' registry, and for classes that it doesn't know to the first call: a block that
        returns one tensor has one stream, one that returns a pair returns (text, image).
        """
        return None

    def compute_residual(self, output: Any, head_input: torch.Tensor) -> Any:
        """What the block stack added to its input: a tensor, or a pair for `apply_residual_tuple`.

        Args:
            output: the last block's image stream, (rows, image_tokens, dim); a method that overrides this one gets what
                the block returned, which may be a tuple.
            head_input: the first block's image stream, same shape.

        Raises:
            ResidualError: the two differ in shape, dtype or device.
        """
        _check("the block stack's output", output, head_input)
        return output - head_input

    def apply_residual(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``hidden`` with a stored residual added, both (rows, image_tokens, dim).

        Raises:
            ResidualError: the two differ in shape, dtype or device.
        """
        _check("a stored residual", residual, hidden)
        return hidden + residual

    def apply_residual_tuple(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        residual: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a pair of residuals to the image and the text stream, for models whose output reads both.

        Raises:
            ResidualError: either differs from its stream in shape, dtype or device.
        """
        return self.apply_residual(hidden_states, residual[0]), self.apply_residual(encoder_hidden_states, residual[1])

    def embed_image(self, transformer: Any, latents: torch.Tensor) -> torch.Tensor:
        """Image tokens as the blocks take them: (rows, tokens, in_channels) -> (rows, tokens, dim).

        `embed` does this for the image being denoised; tokens of reference images are the same at all steps and can be
        embedded once.
        """
        raise self._no_split()

    def embed_time(
        self, transformer: Any, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """The embedding that modulates the blocks, (rows, dim); arguments as for `embed`.

        It doesn't depend on the latents, so that all steps of a request can be embedded at once, one row each.
        """
        raise self._no_split()

    def embed(
        self,
        transformer: Any,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part before the block stack, for rows at different steps.

        Args:
            hidden_states: latents, (rows, image_tokens, in_channels).
            timestep: noise level of each row, (rows,), in [0, 1].
            guidance: distilled guidance of each row, (rows,); None for models without.
            pooled: pooled text embedding, (rows, pooled_dim); None for models without.

        Returns:
            (hidden, temb): (rows, image_tokens, dim) and (rows, dim).

        Raises:
            TypeError: the class has no split.
        """
        hidden = self.embed_image(transformer, hidden_states)
        return hidden, self.embed_time(transformer, timestep.to(hidden.dtype), guidance, pooled)

    def context(self, transformer: Any, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Text embeddings as the blocks take them: (rows, text_tokens, joint_dim) -> (rows, text_tokens, dim)."""
        raise self._no_split()

    def blocks(
        self, transformer: Any, hidden: torch.Tensor, context: torch.Tensor, temb: Embedded, rotary: Rotary
    ) -> torch.Tensor:
        """The block stack, the part that reuse saves: image stream in, image stream out, (rows, image_tokens, dim).

        Args:
            temb: the result of `embed_time`; or one tensor per block, for modules that take their own.
        """
        raise self._no_split()

    def output_modulation(self, transformer: Any, temb: torch.Tensor) -> torch.Tensor:
        """Scale and shift of the blocks' output: (rows, dim) of `embed_time` -> (rows, 2 dim).

        It doesn't depend on the latents either. Computed at each step, it would be most of a reused step's time.
        """
        raise self._no_split()

    def project(self, transformer: Any, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """The part after the block stack: (rows, image_tokens, dim) -> velocity (rows, image_tokens, channels).

        Args:
            modulation: `output_modulation` of each row's step.
        """
        raise self._no_split()

    def _no_split(self) -> TypeError:
        return TypeError(f"{type(self).__name__} has no embed/blocks/project split")


def _check(what: str, residual: torch.Tensor, hidden: torch.Tensor) -> None:
    if (residual.shape, residual.dtype, residual.device) != (hidden.shape, hidden.dtype, hidden.device):
        raise ResidualError(what, residual, hidden)


class _FluxFamily(MagCacheStrategy):
    """The parts that FLUX.1 and FLUX.2 share: embedding text and image tokens, and the output layers."""

    def embed_image(self, transformer: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `MagCacheStrategy.embed_image`."""
        embedded: torch.Tensor = transformer.x_embedder(latents)
        return embedded

    def context(self, transformer: Any, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `MagCacheStrategy.context`."""
        embedded: torch.Tensor = transformer.context_embedder(encoder_hidden_states)
        return embedded

    def output_modulation(self, transformer: Any, temb: torch.Tensor) -> torch.Tensor:
        """See `MagCacheStrategy.output_modulation`; the first half of diffusers' ``AdaLayerNormContinuous``."""
        modulation: torch.Tensor = transformer.norm_out.linear(transformer.norm_out.silu(temb))
        return modulation

    def project(self, transformer: Any, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """See `MagCacheStrategy.project`; the second half of ``AdaLayerNormContinuous``, and the output layer."""
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        velocity: torch.Tensor = transformer.proj_out(transformer.norm_out.norm(hidden) * (1 + scale) + shift)
        return velocity


class FluxStrategy(_FluxFamily):
    """``FluxTransformer2DModel``: FLUX.1-dev, schnell and Kontext."""

    profile_name = "flux.1-dev"

    def register_block_metadata(self, block_class: type) -> BlockMetadata | None:
        """Double- and single-stream blocks both return (context, hidden)."""
        known = block_class.__name__ in ("FluxTransformerBlock", "FluxSingleTransformerBlock")
        return BlockMetadata(hidden_index=1, context_index=0) if known else None

    def embed_time(
        self, transformer: Any, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """See `MagCacheStrategy.embed_time`; ``timestep`` is FluxPipeline's, already divided by 1000."""
        levels = [timestep * 1000] if guidance is None else [timestep * 1000, guidance.to(timestep.dtype) * 1000]
        temb: torch.Tensor = transformer.time_text_embed(*levels, pooled)
        return temb

    def blocks(
        self, transformer: Any, hidden: torch.Tensor, context: torch.Tensor, temb: Embedded, rotary: Rotary
    ) -> torch.Tensor:
        """See `MagCacheStrategy.blocks`."""
        stack = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for block, own in zip(stack, temb if isinstance(temb, tuple) else [temb] * len(stack), strict=True):
            context, hidden = block(
                hidden_states=hidden, encoder_hidden_states=context, temb=own, image_rotary_emb=rotary
            )
        return hidden


class Flux2Strategy(_FluxFamily):
    """``Flux2Transformer2DModel``: FLUX.2-dev and klein. The single-stream tail returns text and image tokens."""

    def register_block_metadata(self, block_class: type) -> BlockMetadata | None:
        """Double-stream blocks return (context, hidden); single-stream blocks one tensor, text first."""
        if block_class.__name__ == "Flux2TransformerBlock":
            return BlockMetadata(hidden_index=1, context_index=0)
        return BlockMetadata() if block_class.__name__ == "Flux2SingleTransformerBlock" else None

    def compute_residual(self, output: Any, head_input: torch.Tensor) -> Any:
        """See `MagCacheStrategy.compute_residual`; ``output`` is (rows, text_tokens + image_tokens, dim)."""
        return super().compute_residual(output[:, -head_input.shape[1] :], head_input)

    def embed_time(
        self, transformer: Any, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """See `MagCacheStrategy.embed_time`; FLUX.2 has no pooled text."""
        scaled = None if guidance is None else guidance.to(timestep.dtype) * 1000
        temb: torch.Tensor = transformer.time_guidance_embed(timestep * 1000, scaled)
        return temb

    def blocks(
        self, transformer: Any, hidden: torch.Tensor, context: torch.Tensor, temb: Embedded, rotary: Rotary
    ) -> torch.Tensor:
        """See `MagCacheStrategy.blocks`."""
        image_tokens = hidden.shape[1]
        image_modulation = transformer.double_stream_modulation_img(temb)
        text_modulation = transformer.double_stream_modulation_txt(temb)
        for block in transformer.transformer_blocks:
            context, hidden = block(
                hidden_states=hidden,
                encoder_hidden_states=context,
                temb_mod_img=image_modulation,
                temb_mod_txt=text_modulation,
                image_rotary_emb=rotary,
            )
        joined = torch.cat([context, hidden], dim=1)  # (rows, text_tokens + image_tokens, dim)
        modulation = transformer.single_stream_modulation(temb)
        for block in transformer.single_transformer_blocks:
            joined = block(
                hidden_states=joined, encoder_hidden_states=None, temb_mod=modulation, image_rotary_emb=rotary
            )
        return joined[:, -image_tokens:]


class QwenImageStrategy(MagCacheStrategy):
    """``QwenImageTransformer2DModel``: double-stream blocks only, for the hook path."""

    def register_block_metadata(self, block_class: type) -> BlockMetadata | None:
        """Blocks return (context, hidden)."""
        known = block_class.__name__ == "QwenImageTransformerBlock"
        return BlockMetadata(hidden_index=1, context_index=0) if known else None


_STRATEGIES: dict[str, MagCacheStrategy] = {
    "FluxTransformer2DModel": FluxStrategy(),
    "Flux2Transformer2DModel": Flux2Strategy(),
    "QwenImageTransformer2DModel": QwenImageStrategy(),
}


def register_strategy(class_name: str, strategy: MagCacheStrategy) -> None:
    """Use ``strategy`` for transformers of the class named ``class_name``; replaces an earlier one."""
    _STRATEGIES[class_name] = strategy


def registered_strategies() -> tuple[str, ...]:
    """Class names that have a strategy."""
    return tuple(sorted(_STRATEGIES))


def get_strategy(transformer: Any) -> MagCacheStrategy:
    """The strategy of a transformer.

    Args:
        transformer: a model, a class or a class name. A model's or class's base classes count too.

    Raises:
        LookupError: none is registered for it; the message lists those that are.
    """
    if isinstance(transformer, str):
        names = [transformer]
    else:
        transformer = getattr(transformer, "_orig_mod", transformer)  # what torch.compile wraps
        cls = transformer if isinstance(transformer, type) else type(transformer)
        names = [base.__name__ for base in cls.__mro__]
    for name in names:
        if name in _STRATEGIES:
            return _STRATEGIES[name]
    raise LookupError(
        f"no MagCache strategy for {names[0]}; registered are {', '.join(registered_strategies())} "
        "(add one with register_strategy)"
    )
