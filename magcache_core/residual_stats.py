"""Statistics of one step's residual against the one before, as the reference implementations log them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F


@dataclass
class StepStatistics:
    """One run's statistics, one entry per step; names as the references log them.

    Attributes:
        norm_ratios: mean over rows and tokens of |R_i| / |R_(i-1)|; the first is 1.
        norm_stds: standard deviation of the same; the first is 0.
        cos_dises: mean of 1 - cosine(R_i, R_(i-1)); the first is 0.
    """

    norm_ratios: list[float] = field(default_factory=list)
    norm_stds: list[float] = field(default_factory=list)
    cos_dises: list[float] = field(default_factory=list)

    def add(self, residual: Any, previous: Any) -> None:
        """Measure one step's residual, (rows, image_tokens, dim) or a pair, in fp32; no ``previous`` at the first."""
        if previous is None:
            ratio, std, cos = 1.0, 0.0, 0.0
        else:
            ratio, std, cos = compare(_joined(residual), _joined(previous))
        self.norm_ratios.append(ratio)
        self.norm_stds.append(std)
        self.cos_dises.append(cos)

    def log(self, logger: logging.Logger) -> None:
        """Log the three lists, five decimals."""
        for name in ("norm_ratios", "norm_stds", "cos_dises"):
            # What a calibration run is for, so it shows where logging was not set up, too.
            logger.warning("MagCache calibration %s: %s", name, [round(value, 5) for value in getattr(self, name)])


def compare(residual: torch.Tensor, previous: torch.Tensor) -> tuple[float, float, float]:
    """Ratio of the tokens' norms (mean, standard deviation) and their mean cosine distance, in fp32.

    Both residuals are (rows, image_tokens, dim); each row is measured by itself and the rows are averaged.
    """
    now, before = residual.float(), previous.float()
    ratios = now.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-8)  # (rows, image_tokens)
    cosine = F.cosine_similarity(now, before, dim=-1, eps=1e-8)
    std = ratios.std(dim=1).mean().item() if ratios.shape[1] > 1 else 0.0
    return ratios.mean().item(), std, (1 - cosine).mean().item()


def _joined(residual: Any) -> torch.Tensor:
    """The tokens of a pair one after another."""
    joined: torch.Tensor = torch.cat(residual, dim=1) if isinstance(residual, tuple) else residual
    return joined
