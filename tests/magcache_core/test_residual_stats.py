"""Statistics of residuals against numbers worked out by hand."""

from __future__ import annotations

import logging

import pytest
import torch

from magcache_core.residual_stats import StepStatistics, compare


def test_norms_and_angles_of_tokens() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])  # norms 5 and 1
    now = torch.tensor([[[6.0, 8.0], [3.0, 0.0]]])  # twice as long, and three times and turned by 90 degrees
    ratio, std, cosine = compare(now.bfloat16(), before.bfloat16())
    assert ratio == pytest.approx(2.5)
    assert std == pytest.approx(0.5**0.5)  # of 2 and 3
    assert cosine == pytest.approx(0.5)
    assert compare(now[:, :1], before[:, :1]) == pytest.approx((2.0, 0.0, 0.0))  # one token has no deviation


def test_rows_are_measured_apart_and_streams_together() -> None:
    statistics = StepStatistics()
    image, text = torch.ones(2, 3, 4), torch.ones(2, 1, 4)
    statistics.add((image, text), None)
    grown = torch.tensor([2.0, 4.0])[:, None, None]  # by row
    statistics.add((image * grown, text * grown), (image, text))
    statistics.add((image * grown, text * grown * 5), (image * grown, text * grown))
    assert statistics.norm_ratios == pytest.approx([1.0, 3.0, 2.0])  # at last three tokens of 1, and one of 5
    assert statistics.norm_stds == pytest.approx([0.0, 0.0, 2.0])
    assert statistics.cos_dises == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_what_is_logged_has_five_decimals(caplog: pytest.LogCaptureFixture) -> None:
    statistics = StepStatistics([1.0, 1.23456789], [0.0, 0.5], [0.0, 1e-9])
    statistics.log(logging.getLogger("magcache_core"))
    assert caplog.messages == [
        "MagCache calibration norm_ratios: [1.0, 1.23457]",
        "MagCache calibration norm_stds: [0.0, 0.5]",
        "MagCache calibration cos_dises: [0.0, 0.0]",
    ]
