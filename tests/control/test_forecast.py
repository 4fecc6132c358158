"""Estimates of when an image is done come true, on ranks whose steps take a known time."""

from __future__ import annotations

import random

import pytest

from app.messages.jobs import MagCacheOptions
from tests.control.simulated_ranks import calibrated, image


@pytest.mark.parametrize(
    "options", [{}, {"true_cfg_scale": 2.0}, {"size": (256, 256)}, {"magcache": MagCacheOptions(False)}]
)
def test_a_lone_images_estimate_is_exact(options) -> None:
    ranks = calibrated()
    entry = ranks.submit(image("a", **options))
    ranks.run()
    assert entry.eta_s == pytest.approx(ranks.finished["a/0"].seconds, rel=0.05)


def test_estimates_hold_in_a_full_queue() -> None:
    """Bursts of unlike images: each is done about when it was told, once batches of this kind were measured."""
    ranks = calibrated()
    draw = random.Random(1)

    def burst(name: str) -> list[float]:
        entries = [
            ranks.submit(
                image(
                    f"{name}{number}",
                    size=draw.choice([(128, 128), (160, 96)]),
                    steps=draw.randint(10, 40),
                    true_cfg_scale=draw.choice([1.0, 1.0, 2.0]),
                )
            )
            for number in range(60)
        ]
        assert {entry.position for entry in entries[:8]} == {0}
        assert [entry.position for entry in entries[8:]] == list(range(9, 61))
        ranks.run()
        return [entry.eta_s / ranks.finished[entry.job.row_id].seconds for entry in entries]

    # What the first in a burst are told cannot know of those behind them.
    unseen, seen = burst("a"), burst("b")
    assert all(0.6 <= ratio <= 1.6 for ratio in unseen[20:]), unseen
    assert all(0.75 <= ratio <= 1.25 for ratio in seen[20:]), seen
    assert all(0.9 <= ratio <= 1.1 for ratio in seen[40:]), seen


def test_estimates_of_running_images_come_true() -> None:
    ranks = calibrated()
    entries = [ranks.submit(image(str(number), steps=20 + number)) for number in range(6)]
    for _ in range(8):
        ranks.tick()
    told = {entry.job.row_id: ranks.now_s + ranks.admission.eta_s(entry) for entry in entries}
    ranks.run()
    for row_id, done_s in told.items():
        assert done_s == pytest.approx(ranks.finished[row_id].seconds + entries[0].submitted_s, rel=0.1)
