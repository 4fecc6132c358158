"""Run a transformer's forward with its block stack observed, or replaced by a residual.

Blocks are wrapped only for the duration of one forward call, by swapping the module lists that hold them. So nothing is
hooked inside a block: a block that was compiled runs as one graph, and skipping costs one Python call per block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from magcache_core.diffusers_bridge import known_block, own_metadata
from magcache_core.strategies import BlockMetadata, MagCacheStrategy

T = TypeVar("T")

BLOCK_LISTS = (
    "blocks",
    "layers",
    "transformer_blocks",
    "single_transformer_blocks",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)
"""Names under which diffusers' transformers keep their blocks; they run in the order of the model's children."""


class BlockTaps:
    """The block stack of one transformer, with a tap before its first and after its last block.

    Attributes:
        head_input: image stream that entered the stack in the last call, (rows, image_tokens, dim).
        tail_output: image stream (for some models with text in front) that left it; None when a residual replaced it.
    """

    def __init__(self, transformer: nn.Module, strategy: MagCacheStrategy) -> None:
        """Find the blocks.

        Raises:
            ValueError: ``transformer`` has no list of blocks.
            LookupError: how a block passes its streams is not known.
        """
        self._transformer = transformer
        self.strategy = strategy
        self.head_input: torch.Tensor | None = None
        self.tail_output: torch.Tensor | None = None
        self._returned: Any = None  # by the last block
        self._residual: Any = None
        lists = [
            (name, child)
            for name, child in transformer.named_children()
            if name in BLOCK_LISTS and isinstance(child, nn.ModuleList) and len(child)
        ]
        if not lists:
            raise ValueError(f"{type(transformer).__name__} has no transformer blocks ({', '.join(BLOCK_LISTS)})")
        self._lists = {name: self._wrap(name, child, lists) for name, child in lists}

    def _wrap(self, name: str, blocks: nn.ModuleList, lists: list[tuple[str, nn.ModuleList]]) -> nn.ModuleList:
        first_list, last_list = lists[0][0], lists[-1][0]
        return nn.ModuleList(
            _Tap(block, self, name == first_list and i == 0, name == last_list and i == len(blocks) - 1)
            for i, block in enumerate(blocks)
        )

    def run(self, forward: Callable[[], T], residual: Any = None) -> T:
        """Call ``forward`` with the stack observed, or with ``residual`` (a tensor or a pair) added in its place."""
        self.head_input = self.tail_output = None
        self._residual = residual
        modules = self._transformer._modules
        originals = {name: modules[name] for name in self._lists}
        modules.update(self._lists)
        try:
            return forward()
        finally:
            modules.update(originals)
            self._residual = None

    @property
    def residual(self) -> Any:
        """What the stack added in the last observed call, (rows, image_tokens, dim), or a strategy's pair."""
        if self.head_input is None or self.tail_output is None:
            raise RuntimeError("the block stack did not run")
        own = type(self.strategy).compute_residual is not MagCacheStrategy.compute_residual
        return self.strategy.compute_residual(self._returned if own else self.tail_output, self.head_input)


class _Tap(nn.Module):
    """Stands where a block stands during one forward call."""

    def __init__(self, block: nn.Module, taps: BlockTaps, head: bool, tail: bool) -> None:
        super().__init__()
        self.block = block
        self._taps = taps
        self._head = head
        self._tail = tail
        self._metadata, self._positions, self._known = _passing(block, taps.strategy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        metadata = self._metadata
        hidden = self._argument(metadata.hidden_name, args, kwargs)
        if self._head:
            self._taps.head_input = hidden
        if self._taps._residual is not None:
            return self._reuse(hidden, args, kwargs)
        output = self.block(*args, **kwargs)
        if not self._known:
            self._learn(output)
        if self._tail:
            self._taps._returned = output
            self._taps.tail_output = output[self._metadata.hidden_index or 0] if isinstance(output, tuple) else output
        return output

    def _learn(self, output: Any) -> None:
        """How a block of an unknown class returns its streams, judged by what it returned."""
        if isinstance(output, tuple):
            if len(output) != 2 or self._metadata.context_name not in self._positions:
                raise LookupError(_how_to_describe(self.block))
            self._metadata = replace(self._metadata, hidden_index=1, context_index=0)
        self._known = True

    def _reuse(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The streams as they came; in the stack's first block with the residual added."""
        strategy, residual = self._taps.strategy, self._taps._residual
        hidden_index, context_index = self._metadata.hidden_index, self._metadata.context_index
        if hidden_index is None or context_index is None:
            return strategy.apply_residual(hidden, residual) if self._head else hidden
        context = self._argument(self._metadata.context_name, args, kwargs)
        if self._head and isinstance(residual, tuple):
            hidden, context = strategy.apply_residual_tuple(hidden, context, residual)
        elif self._head:
            hidden = strategy.apply_residual(hidden, residual)
        streams: list[Any] = [None] * (max(hidden_index, context_index) + 1)
        streams[hidden_index], streams[context_index] = hidden, context
        return tuple(streams)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self._positions[name]]


def _passing(block: nn.Module, strategy: MagCacheStrategy) -> tuple[BlockMetadata, dict[str, int], bool]:
    """A block's metadata, the positions of its parameters, and whether what it returns is known before its first call.

    Raises:
        LookupError: it takes several arguments, of which none has a name that tells the image stream.
    """
    inner = getattr(block, "_orig_mod", block)
    names = [*inspect.signature(inner.forward).parameters]
    positions = {name: i for i, name in enumerate(names)}
    described = own_metadata(strategy.register_block_metadata(type(inner))) or known_block(type(inner))
    if described is not None:
        return described, positions, True
    if "hidden_states" not in names and len(names) != 1:
        raise LookupError(_how_to_describe(inner))
    return BlockMetadata(hidden_name="hidden_states" if "hidden_states" in names else names[0]), positions, False


def _how_to_describe(block: nn.Module) -> str:
    return (
        f"how {type(block).__name__} passes its streams is not known: return it from register_block_metadata of a "
        "strategy registered for this transformer"
    )
