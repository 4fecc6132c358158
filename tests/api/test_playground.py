"""The playground in a real browser, over the application in this process: what depends on the service's kind."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

from app.api.app import create_app
from app.engine.families import FLUX2_KLEIN, FLUX_SCHNELL
from app.settings import Settings
from tests.api.fake_backend import FakeBackend
from tests.browser import Browser, make_browser, watch_browser  # noqa: F401  # fixtures

KEY = "sk-alice-0123456789"
LORAS = {"object": "list", "data": [{"id": "watercolour", "rank": 4}, {"id": "style/ink", "rank": 8}]}
SENT = "const made = fetch; window.sent = []; window.fetch = (...call) => { sent.push(call); return made(...call); };"


@pytest.fixture
def url(base_url: str) -> str:
    return base_url.removesuffix("v1")


@pytest.fixture
def page(browser: Browser, url: str) -> Browser:
    browser.open(url)
    return browser


def code(page: Browser, kind: str) -> str:
    page[f"copy-{kind}"].click()
    page.wait(lambda: page["code-note"].text, "the code")
    return page["code"].text


def body_sent(page: Browser) -> dict[str, Any]:
    """The JSON body of the last request for an image."""
    return json.loads(page.script("return sent.at(-1)[1].body"))


def colour(file: Path) -> Any:
    return Image.open(file).getpixel((0, 0))


def test_every_field_is_named_and_reached_by_keyboard(page: Browser) -> None:
    page["negative"].click()
    page.choose("shape", "custom")
    page.generate()
    page["edit-this"].click()
    page.wait(lambda: page["mask"].is_displayed(), "the brush")
    controls = [
        one for one in page.all("a, button, input, select, textarea, summary, [tabindex='0']") if one.is_displayed()
    ]
    assert len(controls) > 25
    assert [one.get_attribute("outerHTML") for one in controls if not one.accessible_name] == []
    assert [one.get_attribute("outerHTML") for one in controls if one.get_property("tabIndex") < 0] == []
    assert {page[name].get_attribute("role") for name in ("announce", "code-note")} == {"status"}
    assert page["error"].get_attribute("role") == "alert"


def test_what_is_left_empty_is_not_sent_and_a_seed_keeps_its_digits(page: Browser) -> None:
    page.script(SENT)
    page.generate()
    common = {"prompt": "a red circle on a blue background", "stream": True, "partial_images": 3, "progress": True}
    assert body_sent(page) == common
    page.fill("seed", str(2**64 - 1))
    page.fill("guidance_scale", "2.5")
    page.choose("shape", page.all("#shape option")[1].get_attribute("value"))
    page.choose("cache", "quality")
    page.generate()
    size = page["shape"].get_property("value")
    assert body_sent(page) == common | {"seed": 2**64 - 1, "guidance_scale": 2.5, "quality": "medium", "size": size}
    page.all("#images button")[1].click()
    page["restore"].click()
    assert (page["guidance_scale"].get_property("value"), page["shape"].get_property("value")) == ("", "auto")


def test_the_code_makes_the_same_image(page: Browser, tmp_path: Path, backend: FakeBackend) -> None:
    page.fill("prompt", 'it\'s "quoted", $HOME and `ls`')
    page.choose("cache", "budget")
    page.fill("computed_steps", "8")
    for edited in (False, True):
        page.generate()
        Image.new("RGB", (128, 128)).save(tmp_path / "source.png")
        for kind, command in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
            subprocess.run([*command, code(page, kind)], cwd=tmp_path, check=True, timeout=60)
            first, again = backend.jobs[-2:] if kind == "curl" else (backend.jobs[-3], backend.jobs[-1])
            assert again.prompt == first.prompt == 'it\'s "quoted", $HOME and `ls`'
            assert (again.seed, again.magcache, bool(again.sources)) == (first.seed, first.magcache, edited)
            assert colour(tmp_path / "image.png") == (first.seed % 256, first.seed // 256 % 256, 128)
        page["edit-this"].click()
        page.wait(lambda: page["source-view"].is_displayed(), "the image to edit")


class TestWithKeys:
    @pytest.fixture
    def app(self, backend: FakeBackend, tmp_path: Path) -> FastAPI:
        (tmp_path / "keys").write_text(f"alice {KEY}\n")
        return create_app(Settings.model_validate({"http": {"api_keys_file": str(tmp_path / "keys")}}), lambda: backend)

    def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(
        self, browser: Browser, url: str, backend: FakeBackend
    ) -> None:
        browser.driver.get(url)
        browser.wait(lambda: browser["key"].is_displayed(), "the field for the key")
        assert not browser["docs"].is_displayed(), "the browser would open it without the key"
        give_key(browser, "sk-eve")
        browser.wait(lambda: "invalid_api_key" in browser["error"].text, "the refusal")
        give_key(browser, KEY)
        browser.wait(lambda: browser["model"].is_displayed(), "the name of the model")
        assert all("status of 401" in one for one in browser.complaints())
        browser.generate()
        assert backend.jobs[-1].key_name == "alice"
        assert KEY not in code(browser, "curl") + code(browser, "python")
        browser.driver.refresh()
        browser.wait(lambda: browser["model"].is_displayed(), "the name of the model, by the key that was kept")
        assert browser.script("return localStorage.length") == 0


def give_key(page: Browser, key: str) -> None:
    page.fill("key", key)
    page["prompt"].click()


class TestWithLoras:
    @pytest.fixture
    def app(self, settings: Settings, backend: FakeBackend) -> FastAPI:
        """Lists two adapters, after a while, whatever the service itself has."""

        async def listing() -> dict[str, Any]:
            await asyncio.sleep(0.5)
            return LORAS

        app = create_app(settings, lambda: backend)
        app.add_api_route("/v1/loras", listing)
        app.router.routes.insert(0, app.router.routes.pop())
        return app

    def test_adapters_are_chosen_with_their_scale(self, page: Browser) -> None:
        assert all(page[part].is_displayed() for part in ("loras", "negative", "edit")), (
            "once the model's name is there"
        )
        page.script(SENT)
        _, _, box, scale = page.all("#lora-list input")
        assert not scale.is_enabled()
        box.click()
        scale.clear()
        scale.send_keys("0.5")
        page["generate"].click()
        page.wait(lambda: page.script("return sent.length"), "the request")
        assert body_sent(page)["lora"] == [{"name": "style/ink", "scale": 0.5}]
        page.wait(lambda: not page["cancel"].is_displayed(), "the end")
        page.complaints()  # the service in this test has no adapters of its own, and may refuse the field


@pytest.mark.parametrize(("kind", "shown"), [(FLUX_SCHNELL, ["negative"]), (FLUX2_KLEIN, ["edit"])])
def test_what_the_model_does_not_take_is_not_offered(
    browser: Browser,
    url: str,
    backend: FakeBackend,
    kind: Any,
    shown: list[str],
) -> None:
    backend.kind = kind
    browser.open(url)
    names = ("edit", "negative")
    browser.wait(lambda: [name for name in names if browser[name].is_displayed()] == shown, str(shown))
    assert not browser["loras"].is_displayed()
