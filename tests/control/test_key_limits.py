"""What one API key may ask of a group: images that wait, and work a minute."""

from __future__ import annotations

import pytest

from app.errors import BusyError
from app.messages.jobs import MagCacheOptions
from app.settings import HttpSettings, KeySettings, MagCacheSettings, Settings
from tests.control.simulated_ranks import SimulatedRanks
from tests.local_group import job

EVERY_STEP = MagCacheOptions(enabled=False)
TINY = {"magcache": MagCacheSettings(profile="flux-tiny"), "http": HttpSettings(api_keys_file="keys")}


def limited(**keys: object) -> SimulatedRanks:
    return SimulatedRanks(Settings(max_batch_rows=1, keys=KeySettings(**keys), **TINY))


def test_a_keys_waiting_images_are_limited() -> None:
    ranks = limited(max_waiting_pictures=3)
    for number in range(4):  # one joins, three wait
        ranks.submit(job(f"a{number}/0", steps=4, magcache=EVERY_STEP, key_name="a"))
    with pytest.raises(BusyError, match="4 images of this API key wait, and 3 may") as refused:
        ranks.submit(job("a4/0", steps=4, magcache=EVERY_STEP, key_name="a"))
    assert refused.value.retry_after_s >= 0
    assert ranks.admission.counts.refused == 1
    ranks.submit(job("b0/0", steps=4, magcache=EVERY_STEP, key_name="b"))
    ranks.run()
    ranks.submit(job("a5/0", steps=4, magcache=EVERY_STEP, key_name="a"))


def test_a_keys_work_a_minute_is_limited() -> None:
    """128x128 pixels in 10 steps are 0.16384 megapixel-steps, with true CFG twice as many."""
    ranks = limited(megapixel_steps_per_minute=0.4)

    def ask(name: str, **options: object) -> None:
        ranks.submit(job(name, steps=10, magcache=EVERY_STEP, key_name=name[0], **options))

    for number in range(3):
        ask(f"a{number}/0")
    with pytest.raises(BusyError, match=r"0\.4 megapixel-steps a minute") as refused:
        ask("a3/0")
    assert refused.value.retry_after_s == pytest.approx((3 * 0.16384 - 0.4) * 60 / 0.4)
    ask("b0/0", true_cfg_scale=2.0)
    ask("b1/0")
    with pytest.raises(BusyError):
        ask("b2/0")
    ranks.run()
    ranks.now_s += refused.value.retry_after_s
    ask("a4/0")
    ranks.run()
    ranks.now_s += 3600.0  # what is not used is not saved up beyond a minute's worth
    for number in range(5, 8):
        ask(f"a{number}/0")
    with pytest.raises(BusyError):
        ask("a8/0")


def test_without_a_key_there_are_no_limits_of_keys() -> None:
    ranks = SimulatedRanks(
        Settings(magcache=TINY["magcache"], keys=KeySettings(max_waiting_pictures=1, megapixel_steps_per_minute=0.001))
    )
    for number in range(20):
        ranks.submit(job(f"{number}/0", steps=4, magcache=EVERY_STEP))
