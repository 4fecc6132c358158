"""A residual that does not fit is refused, and the blocks are back in place."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

from magcache_core import ResidualError, get_strategy
from magcache_core.taps import BlockTaps
from tests.magcache_core.hooked import call_flux


@pytest.mark.parametrize("wrong", [(1, 9, 32), (2, 16, 32), (1, 16, 31)])
def test_a_residual_of_another_shape_raises_with_both(flux: FluxTransformer2DModel, wrong: tuple[int, ...]) -> None:
    taps = BlockTaps(flux, get_strategy(flux))
    with pytest.raises(ResidualError) as error:
        taps.run(lambda: call_flux(flux, 0.5), torch.zeros(wrong))
    assert str(wrong) in str(error.value)
    assert "(1, 16, 32)" in str(error.value)
    assert len(flux.transformer_blocks) == 1  # the blocks are back in place


def test_a_residual_of_another_dtype_or_device_raises(flux: FluxTransformer2DModel) -> None:
    taps = BlockTaps(flux, get_strategy(flux))
    for residual in (torch.zeros(1, 16, 32, dtype=torch.bfloat16), torch.zeros(1, 16, 32, device="meta")):
        with pytest.raises(ResidualError, match=r"bfloat16|meta"):
            taps.run(lambda residual=residual: call_flux(flux, 0.5), residual)  # type: ignore[misc]
