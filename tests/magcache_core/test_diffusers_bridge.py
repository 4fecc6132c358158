"""Hooks in diffusers' own registry, and how diffusers describes blocks."""

from __future__ import annotations

import pytest
from diffusers import FluxTransformer2DModel
from diffusers.hooks._helpers import TransformerBlockMetadata
from torch import nn

from magcache_core import BlockMetadata
from magcache_core.diffusers_bridge import (
    StatefulHook,
    attach,
    detach,
    enter_default_context,
    known_block,
    new_states,
    own_metadata,
)


class Counting:
    """A state as diffusers' manager makes them."""

    def __init__(self) -> None:
        self.calls = 0

    def reset(self) -> None:
        self.calls = 0


class Doubling(StatefulHook):
    """Counts calls by context, and doubles what the module gives."""

    def new_forward(self, module: nn.Module, *args: object) -> object:
        enter_default_context(self.state_manager)
        self.state_manager.get_state().calls += 1
        return 2 * self.fn_ref.original_forward(*args)


class Plain(nn.Module):
    def forward(self, value: float) -> float:
        return value + 1


def doubling() -> Doubling:
    return Doubling(new_states(Counting))


def test_a_hook_replaces_that_of_its_name_and_leaves_the_module_as_it_was() -> None:
    module, first, second = Plain(), doubling(), doubling()
    detach(module, ("mine",))  # nothing there, nothing done
    attach(module, {"mine": first})
    assert module(1.0) == 4.0
    attach(module, {"mine": second})
    assert module(1.0) == 4.0, "doubled once"
    assert second.context_name() == "inference"
    assert second.state_manager.get_state().calls == 1
    detach(module, ("mine", "another"))
    assert module(1.0) == 2.0
    assert second.state_manager._state_cache == {}


def test_blocks_of_diffusers_are_known(flux: FluxTransformer2DModel) -> None:
    known = known_block(type(flux.transformer_blocks[0]))
    assert known == BlockMetadata(1, 0, "hidden_states", "encoder_hidden_states")
    assert known_block(Plain) is None


@pytest.mark.parametrize("metadata", [None, BlockMetadata(hidden_index=1, context_index=0)])
def test_own_descriptions_stay(metadata: BlockMetadata | None) -> None:
    assert own_metadata(metadata) is metadata


def test_diffusers_descriptions_are_taken_over() -> None:
    theirs = TransformerBlockMetadata(0, 1)
    theirs._cls = Plain
    made = own_metadata(theirs)
    assert made is not None
    assert (made.hidden_index, made.context_index) == (0, 1)
    assert (made.hidden_name, made.context_name) == ("hidden_states", "encoder_hidden_states")
