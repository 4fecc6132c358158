"""The playground over HTTP: for browsers only, without a key, under a strict policy, and sent once."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from app.api.app import create_app
from app.settings import Settings
from tests.api.fake_backend import FakeBackend
from tests.api.test_accept import CHROMIUM

BROWSER = {"Accept": CHROMIUM}
FILES = {"/": "text/html", "/page/style.css": "text/css", "/page/playground.js": "text/javascript"}


async def test_a_browser_gets_the_page_and_others_json(client: httpx.AsyncClient) -> None:
    page, index = await client.get("/", headers=BROWSER), await client.get("/")
    assert page.text.startswith("<!doctype html>")
    assert index.json()["service"] == "flux-magcache-serve"
    assert page.headers["vary"] == index.headers["vary"] == "Accept", "no cache may mix the two up"


@pytest.mark.parametrize(("path", "media_type"), FILES.items())
async def test_a_file_comes_with_its_type_and_is_sent_once(
    client: httpx.AsyncClient, path: str, media_type: str
) -> None:
    first = await client.get(path, headers=BROWSER)
    assert (first.status_code, first.headers["content-type"]) == (200, f"{media_type}; charset=utf-8")
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get(path, headers={**BROWSER, "If-None-Match": f"W/{first.headers['etag']}"})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert (await client.get(path, headers={**BROWSER, "If-None-Match": '"another"'})).status_code == 200


async def test_the_policy_allows_what_the_service_sends_and_nothing_else(client: httpx.AsyncClient) -> None:
    policy = (await client.get("/", headers=BROWSER)).headers["content-security-policy"]
    assert dict(directive.split(" ", 1) for directive in policy.split("; ")) == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


async def test_the_page_names_files_that_exist_by_relative_addresses(client: httpx.AsyncClient) -> None:
    """Relative ones, so that it works below a gateway's prefix."""
    page = (await client.get("/", headers=BROWSER)).text
    addresses = re.findall(r'(?:src|href)="([^#"]+)"', page)
    loaded = [address for address in addresses if address.startswith("page/")]
    assert {f"/{address}" for address in loaded} == set(FILES) - {"/"}
    assert [address for address in addresses if re.match("https?:|/", address)] == []


async def test_there_are_no_other_files(client: httpx.AsyncClient) -> None:
    for path in ("/page/index.html", "/page/..%2F__init__.py", "/page/none.js"):
        response = await client.get(path, headers=BROWSER)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


async def test_with_keys_the_page_needs_none_and_the_index_does(tmp_path: Path, backend: FakeBackend) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-alice-0123456789\n", encoding="utf-8")
    app = create_app(Settings.model_validate({"http": {"api_keys_file": str(keys)}}), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for path in FILES:
            assert (await client.get(path, headers=BROWSER)).status_code == 200, path
        assert (await client.get("/page/style.css/")).status_code == 200
        for path in ("/", "/page/none.js"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/v1/models", headers=BROWSER)).status_code == 401
