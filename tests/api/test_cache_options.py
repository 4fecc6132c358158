"""A request's `quality` and `magcache` and the server's settings together give the job's options."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.api.app import create_app
from app.messages.jobs import MagCacheOptions
from app.settings import MagCacheSettings, Settings
from tests.api.fake_backend import FakeBackend
from tests.api.refusals import assert_refused

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


async def test_a_request_overrides_the_servers_magcache(backend: FakeBackend) -> None:
    server = MagCacheSettings(enabled=False, mag_threshold=0.2, mag_max_skip_steps=4)
    app = create_app(Settings(magcache=server), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for magcache in (
            {},
            {"enabled": True},
            {"enabled": True, "mag_threshold": 0, "mag_retention_ratio": 1},
            {"enabled": True, "computed_steps": 9},
        ):
            assert (await client.post(URL, json={**PROMPT, "magcache": magcache})).status_code == 200
    assert [job.magcache for job in backend.jobs] == [
        MagCacheOptions(False, 0.2, 4, None),
        MagCacheOptions(True, 0.2, 4, None),
        MagCacheOptions(True, 0.0, 4, 1.0, client_chose=True),
        MagCacheOptions(True, None, 4, None, computed_steps=9, client_chose=True),
    ]


@pytest.mark.parametrize(
    ("fields", "share", "floor_db", "said"),
    [
        ({"quality": "low"}, 0.25, 28.0, "low"),
        ({"quality": "medium"}, 0.4, 32.0, "medium"),
        ({"quality": "high"}, 0.65, 38.0, "high"),
        ({"quality": "hd"}, 0.65, 38.0, "high"),
        ({"quality": "standard"}, None, None, "auto"),
        ({"quality": "auto"}, None, None, "auto"),
        ({}, None, None, "auto"),
    ],
)
async def test_quality_is_a_floor_or_a_share_of_computed_steps(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    fields: dict[str, Any],
    share: float | None,
    floor_db: float | None,
    said: str,
) -> None:
    response = await client.post(URL, json={**PROMPT, **fields})
    assert response.status_code == 200, response.text
    options = backend.jobs[0].magcache
    assert (options.enabled, options.computed_share, options.computed_steps) == (True, share, None)
    assert options.floor_db == floor_db
    assert options.client_chose == (share is not None)
    assert response.json()["quality"] == said


async def test_a_quality_asks_for_reuse_where_the_server_has_none_by_default(backend: FakeBackend) -> None:
    settings = Settings(magcache=MagCacheSettings(enabled=False, mag_threshold=0.2))
    app = create_app(settings, lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for fields in ({"quality": "low"}, {"quality": "auto"}):
            assert (await client.post(URL, json={**PROMPT, **fields})).status_code == 200
    low, auto = (job.magcache for job in backend.jobs)
    assert (low.enabled, low.computed_share, low.mag_threshold) == (True, 0.25, None)
    assert (auto.enabled, auto.computed_share, auto.mag_threshold) == (False, None, 0.2)


@pytest.mark.parametrize(
    ("magcache", "chose"),
    [
        ({}, False),
        ({"mag_max_skip_steps": 3}, False),
        ({"min_computed_steps": 3}, False),
        ({"mag_threshold": 0.2}, True),  # also where it is the server's own
        ({"computed_steps": 9}, True),
    ],
)
async def test_what_the_client_chose_is_said_and_not_guessed(
    backend: FakeBackend, magcache: dict[str, Any], chose: bool
) -> None:
    app = create_app(Settings(magcache=MagCacheSettings(mag_threshold=0.2)), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert (await client.post(URL, json={**PROMPT, "magcache": magcache})).status_code == 200
    assert backend.jobs[0].magcache.client_chose is chose


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"magcache": {"computed_steps": 29}}, "magcache.computed_steps", "at most 28"),
        ({"magcache": {"computed_steps": 9, "mag_threshold": 0.1}}, "magcache.mag_threshold", "exclude each other"),
        ({"magcache": {"min_computed_steps": 29}}, "magcache.min_computed_steps", "at most 28"),
        (
            {"magcache": {"computed_steps": 9, "min_computed_steps": 10}},
            "magcache.min_computed_steps",
            "above the 9 steps that magcache.computed_steps computes",
        ),
        ({"quality": "high", "magcache": {"computed_steps": 9}}, "quality", "magcache.computed_steps both decide"),
        ({"quality": "hd", "magcache": {"mag_threshold": 0.1}}, "quality", "magcache.mag_threshold both decide"),
        ({"quality": "low", "magcache": {"enabled": False}}, "quality", "magcache.enabled false computes all"),
    ],
)
async def test_a_contradiction_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, changes: dict[str, Any], param: str, words: str
) -> None:
    await assert_refused(client, backend, changes, param, words)
