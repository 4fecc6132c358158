"""Calls of a hooked transformer, and which of them compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from magcache_core.taps import BlockTaps


class Recorder:
    """Notes which calls of transformers run their blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        original = BlockTaps.run

        def run(taps: BlockTaps, forward: Callable[[], Any], residual: torch.Tensor | None = None) -> Any:
            self.calls.append("C" if residual is None else ".")
            return original(taps, forward, residual)

        monkeypatch.setattr(BlockTaps, "run", run)

    def take(self) -> str:
        marks = "".join(self.calls)
        self.calls.clear()
        return marks


def call_flux(flux: Any, timestep: float, **options: Any) -> torch.Tensor:
    """One forward call with the same inputs each time, but for the noise level."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(16, 3)
    ids[:, 1] = torch.arange(16) // 4
    ids[:, 2] = torch.arange(16) % 4
    with torch.no_grad():
        return flux(
            hidden_states=torch.randn(1, 16, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 24, generator=generator),
            pooled_projections=torch.randn(1, 20, generator=generator),
            timestep=torch.tensor([timestep]),
            guidance=torch.tensor([3.5]),
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            **options,
        ).sample
