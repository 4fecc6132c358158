"""Weights that hold NaN or an infinity are refused when they are loaded: images would be black, one after another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from app.engine.checkpoint_files import CheckpointError


def check_finite(path: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Read all of ``weights`` once, where they are.

    Args:
        path: the file or folder that they come from.
        weights: names and floating-point tensors, in the dtype that they are used in.

    Raises:
        CheckpointError: one holds NaN or an infinity.
    """
    for name, tensor in weights:
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # aminmax keeps NaN, and makes no copy
            raise CheckpointError(
                f"{path}: {name} holds values that are not finite: the file is damaged (download it again), or "
                f"dtype {str(tensor.dtype).removeprefix('torch.')} is too small for it"
            )
