"""The only place that touches diffusers' hook system (0.42), imported when a hook is attached and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from magcache_core.strategies import BlockMetadata


class StatefulHook:
    """A hook as diffusers' registry wants it: it asks for these members, not for a base class.

    Attributes:
        state_manager: diffusers' ``StateManager``; ``cache_context`` sets its context.
        fn_ref: set by the registry; ``fn_ref.original_forward`` is the forward that the hook replaces.
    """

    _is_stateful = True

    def __init__(self, state_manager: Any) -> None:
        self.state_manager = state_manager
        self.fn_ref: Any = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is attached."""
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed (the name's spelling is diffusers')."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called before the forward; changes nothing."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after the forward; changes nothing."""
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the states of all contexts."""
        self.state_manager.reset()
        return module

    def context_name(self) -> str:
        """The ``cache_context`` of the call under way; ``inference`` outside of any, as diffusers names it."""
        context = self.state_manager._context
        return "inference" if context is None else str(context.name)


def new_states(state_class: type) -> Any:
    """A ``StateManager``: one state per ``cache_context``."""
    from diffusers.hooks.hooks import StateManager

    return StateManager(state_class)


def enter_default_context(state_manager: Any) -> None:
    """Give calls outside of any ``cache_context`` one of their own."""
    from diffusers.hooks.hooks import CacheContext

    if state_manager._context is None:
        state_manager.set_context(CacheContext(name="inference"))


def attach(module: nn.Module, hooks: dict[str, StatefulHook]) -> None:
    """Register hooks on ``module`` by name, replacing those of the same names."""
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    detach(module, tuple(hooks))
    for name, hook in hooks.items():
        registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()


def detach(module: nn.Module, names: tuple[str, ...]) -> None:
    """Remove hooks from ``module`` and reset their states; names that aren't there are fine."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    for name in reversed(names):
        hook = registry.get_hook(name)
        if hook is not None:
            hook.reset_state(module)
            registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()


def known_block(block_class: type) -> BlockMetadata | None:
    """How a block class of diffusers passes its streams; None when diffusers doesn't know it."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    get: Callable[[type], Any] = TransformerBlockRegistry.get
    try:
        return own_metadata(get(block_class))
    except ValueError:
        return None


def own_metadata(metadata: Any) -> BlockMetadata | None:
    """``metadata`` as `BlockMetadata`, from diffusers' ``TransformerBlockMetadata`` or as it is."""
    if metadata is None or isinstance(metadata, BlockMetadata):
        return metadata
    return BlockMetadata(
        metadata.return_hidden_states_index,
        metadata.return_encoder_hidden_states_index,
        metadata.hidden_states_argument_name,
        metadata.encoder_hidden_states_argument_name,
    )
