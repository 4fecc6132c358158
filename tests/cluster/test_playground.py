"""The playground in a real browser, over the running service."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

from tests.browser import Browser, make_browser, watch_browser  # noqa: F401  # fixtures
from tests.cluster.asking import IMAGES, PROMPT, ask, metrics, pixels
from tests.patience import wait_for

SHOWN = """
const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
const image = document.getElementById(args[0]);
Object.assign(context.canvas, { width: image.naturalWidth, height: image.naturalHeight });
context.drawImage(image, 0, 0);
return context.canvas.toDataURL();
"""
WATCH = """
window.seen = { steps: [], previews: 0, plans: new Set() };
new MutationObserver(() => {
  const timeline = document.getElementById("timeline");
  if (!timeline.dataset.plan) return;
  seen.steps.push([Number(timeline.ariaValueNow), timeline.querySelectorAll(".ahead").length]);
  seen.plans.add(timeline.dataset.plan);
  seen.previews += document.getElementById("image").dataset.preview ? 1 : 0;
}).observe(document.getElementById("result"), { subtree: true, attributes: true });
"""


@pytest.fixture
def page(browser: Browser, service: str) -> Browser:
    browser.open(service)
    browser.wait(lambda: browser["negative"].is_displayed(), "what the service offers")
    return browser


def shown(page: Browser, name: str = "image") -> np.ndarray:
    """The pixels of an image of the page, from 0 to 1."""
    data = base64.b64decode(page.script(SHOWN, name).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) / 255


def cells(page: Browser) -> list[str]:
    """The decisions that each branch's row of the timeline shows."""
    return [
        "".join("C" if "computed" in (cell or "") else "." for cell in row)
        for row in page.script(
            "return [...document.querySelectorAll('.cells')].map(row => [...row.children].map(cell => cell.className))"
        )
    ]


def facts(page: Browser) -> dict[str, str]:
    return dict(zip((e.text for e in page.all("dt")), (e.text for e in page.all("dd")), strict=True))


def test_an_image_is_made_and_its_steps_are_seen(page: Browser, http: httpx.Client) -> None:
    page.script(WATCH)
    page.fill("prompt", PROMPT)
    page.fill("seed", "7")
    page.fill("num_inference_steps", "100")
    page["negative"].click()
    page.fill("negative_prompt", "a green square")
    page.generate()
    reply = ask(http, num_inference_steps=100, negative_prompt="a green square")["data"][0]
    plan = reply["magcache"]
    assert cells(page) == [plan["schedule"], plan["negative_schedule"]]
    seen = page.script("return { ...seen, plans: [...seen.plans] }")
    assert seen["previews"] > 0
    assert len({step for step, _ in seen["steps"]} - {0, 100}) > 1, "the steps were drawn as they came"
    assert all(ahead == 2 * (100 - step) for step, ahead in seen["steps"]), "and those to come were drawn as planned"
    assert seen["plans"][-1].split() == ["prompt", plan["schedule"], "negative", plan["negative_schedule"]]
    assert facts(page)["Computed"] == f"{plan['computed']} of 100 steps"
    assert facts(page)["Computed, negative"] == f"{plan['negative_schedule'].count('C')} of 100 steps"
    assert facts(page)["Seed"] == "7"
    assert float(facts(page)["Predicted error"]) == pytest.approx(plan["predicted_error"], rel=1e-2)
    assert [entry.text.split()[0] for entry in page.all("#phases li")] == ["queue", "encode", "denoise", "decode"]
    assert np.abs(shown(page) - pixels(reply)).max() <= 2 / 255
    assert page["announce"].get_property("textContent").startswith("The image is done")


def test_the_cached_image_is_compared_with_every_step_computed(page: Browser) -> None:
    page.choose("cache", "budget")
    page.fill("computed_steps", "8")
    page.generate()
    page["compare"].click()
    page.wait(lambda: page["verdict"].text, "the comparison")
    assert page.driver.switch_to.active_element == page["comparison"]
    cached, full = shown(page, "cached"), shown(page, "full")
    expected = -10 * np.log10(np.mean((cached - full) ** 2))
    assert float(page["verdict"].text.split(" dB")[0]) == pytest.approx(expected, abs=0.06)
    assert "8 steps computed" in page["cached-caption"].text
    assert "28 computed" in page["full-caption"].text
    brightest = (
        "return Math.max(...args[0].getContext('2d').getImageData(0, 0, 128, 128).data.filter((_, i) => i % 4 < 3))"
    )
    difference = round(np.abs(cached - full).max() * 255)
    assert page.script(brightest, page["difference"]) == min(32 * difference, 255)


def test_an_adapter_of_the_service_is_chosen(page: Browser, http: httpx.Client) -> None:
    name = http.get("/v1/loras").json()["data"][0]["id"]
    first, *_ = page.all("#lora-list input[type=checkbox]")
    first.click()
    page.fill("prompt", PROMPT)
    page.fill("seed", "7")
    page.generate()
    with_it, without = (pixels(ask(http, **body)["data"][0]) for body in ({"lora": [{"name": name}]}, {}))
    assert np.abs(shown(page) - with_it).max() <= 2 / 255
    assert np.abs(shown(page) - without).max() > 0.1


def test_cancel_ends_the_request(page: Browser, http: httpx.Client) -> None:
    cancelled = metrics(http)["flux_pictures_cancelled_total"]
    page.choose("shape", "custom")
    page.fill("width", "256")
    page.fill("height", "256")
    page.fill("num_inference_steps", "100")
    page.choose("cache", "off")
    page["generate"].click()
    page.wait(lambda: page["phase"].text.startswith("Step"), "a step")
    page["cancel"].click()
    page.wait(lambda: page["phase"].text == "Cancelled", "the end")
    assert not page["cancel"].is_displayed()
    assert not page["error"].is_displayed()
    wait_for(lambda: metrics(http)["flux_pictures_cancelled_total"] > cancelled, "the service has ended it")


def test_an_error_is_shown_in_the_apis_words_at_its_field(page: Browser, http: httpx.Client) -> None:
    page.choose("cache", "budget")
    page.fill("computed_steps", "1000")
    page["generate"].click()
    page.wait(lambda: page["error"].is_displayed(), "the error")
    error = http.post(IMAGES, json={"prompt": PROMPT, "magcache": {"computed_steps": 1000}}).json()["error"]
    assert page["error"].text.splitlines()[0] == error["message"]
    assert "magcache.computed_steps" in page["error"].text
    assert page["computed_steps"].get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element == page["computed_steps"]
    assert page["phase"].text == "Failed"
    (complaint,) = page.complaints()  # Chromium's own, of every reply above 399
    assert "status of 400" in complaint
    page.fill("computed_steps", "10")
    page.generate()
    assert page["computed_steps"].get_attribute("aria-invalid") is None


def test_an_image_is_edited_below_the_brush_and_stays_elsewhere(page: Browser) -> None:
    page.fill("seed", "7")
    page.generate()
    before = shown(page)
    page["edit-this"].click()
    page.wait(lambda: page["mask"].is_displayed(), "the brush")
    page.script("const b = document.getElementById('brush'); b.value = 40; return null")
    height = page["mask"].size["height"]
    ActionChains(page.driver).move_to_element_with_offset(
        page["mask"], 0, -height // 4
    ).click_and_hold().move_by_offset(10, 0).release().perform()
    page.fill("prompt", "a green square on a blue background")
    page.fill("seed", "3")
    page.generate()
    change = np.abs(shown(page) - before).max(axis=2)
    assert change[20:44, 52:76].mean() > 5 * change[96:].mean()
    assert change[96:].max() < 0.2, "what is far from the mask is as the VAE renders it"


def test_a_phones_width_is_enough_in_light_and_dark(page: Browser) -> None:
    page["negative"].click()
    page.generate()
    page["compare"].click()
    page.wait(lambda: page["comparison"].is_displayed(), "the comparison")
    page["copy-python"].click()
    page["edit-this"].click()
    page.wait(lambda: page["mask"].is_displayed(), "the brush")
    page.resize(360, 740)
    assert page.script("return document.documentElement.scrollWidth") == 360
    backgrounds = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        backgrounds.add(page.script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
