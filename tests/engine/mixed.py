"""Requests that share batches in the tests of several ranks."""

from __future__ import annotations

from app.messages.conditioning import Conditioning
from app.messages.jobs import MagCacheOptions
from app.messages.plans import StepPlan
from tests.local_group import job, plans, random_conditioning


def mixed() -> tuple[list[StepPlan], dict[str, Conditioning]]:
    """Requests of several sizes (49, 60 and 64 image tokens) and settings that arrive one after another."""
    cached = MagCacheOptions(True)
    jobs = [
        job("a/0", steps=10),
        job("b/0", steps=12, size=(160, 96), magcache=cached),
        job("c/0", steps=8, true_cfg_scale=2.0, magcache=cached),
        job("d/0", steps=9, size=(112, 112), magcache=cached),
    ]
    conditioning = {one.row_id: random_conditioning(one, seed) for seed, one in enumerate(jobs)}
    return plans(jobs, arrivals=[0, 2, 4, 5]), conditioning
