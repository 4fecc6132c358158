"""The coordinator reads calibrated profiles again, with a real rank in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.messages.jobs import MagCacheOptions
from magcache_core import load_profile, save_profile
from tests.cluster import test_coordinator
from tests.cluster.test_coordinator import Group, conditioning, group

__all__ = ["conditioning", "group"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = test_coordinator.SETTINGS
    magcache = settings.magcache.model_copy(update={"profile_dir": str(tmp_path)})
    monkeypatch.setattr(test_coordinator, "SETTINGS", settings.model_copy(update={"magcache": magcache}))
    return tmp_path


async def test_new_images_follow_a_new_profile_and_the_log_says_so(
    group: Group, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stream = group.stream("before/0", magcache=MagCacheOptions())
    await anext(stream)  # its schedule is made
    save_profile(replace(load_profile("flux-tiny"), name="own", budget=8), folder)
    await group.coordinator.read_profiles()
    after = await group.start("after/0", magcache=MagCacheOptions())
    assert after.report.profile is not None
    assert after.report.profile.startswith("own@")
    *_, before = [item async for item in stream]
    assert (after.report.computed, before.report.computed) == (8, 10)
    assert f"by {after.report.profile}, before {before.report.schedule} by flux-tiny@" in caplog.text
