"""Debian's Chromium for tests of the page, and what they do in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.ops.needs import missing

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass(frozen=True)
class Browser:
    """The page in a browser."""

    driver: Chrome

    def open(self, url: str) -> None:
        """Open the page anew."""
        self.driver.get(url)
        self.wait(lambda: self["shape"].is_displayed() and self["model"].text, "the name of the model")

    def __getitem__(self, name: str) -> WebElement:
        """The element with the id ``name``."""
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        """The elements that a CSS selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, what: Callable[[], Any], then: str, seconds: float = 60.0) -> Any:
        """Wait until ``what`` is true, and fail with what should have come, and the page's error, if it does not."""
        try:
            return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: what())
        except Exception as error:
            raise AssertionError(f"not in {seconds:g} s: {then}; error: {self['error'].text!r}") from error

    def fill(self, name: str, text: str) -> None:
        """Replace the text of a field."""
        self[name].clear()
        self[name].send_keys(text)

    def choose(self, name: str, value: str) -> None:
        """Choose among radio buttons or a list."""
        if self.all(f"[name={name}][type=radio]"):
            self.all(f"[name={name}][value={value}]")[0].find_element(By.XPATH, "..").click()
        else:
            Select(self[name]).select_by_value(value)

    def generate(self) -> None:
        """Have an image made, and wait for it."""
        self["generate"].click()
        self.wait(lambda: self["actions"].is_displayed() and not self["cancel"].is_displayed(), "the image")

    def script(self, code: str, *arguments: Any) -> Any:
        """What a function body returns, or its promise."""
        return self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{ {code} }})(...arguments).then(done, (error) => done(String(error)))",
            *arguments,
        )

    def resize(self, width: int, height: int = 900) -> None:
        """Give the page a size, smaller than a window can be."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def complaints(self) -> list[str]:
        """What the console says since the last call: errors of the script, violated policies, failed requests."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with ``profile`` as its folder; the test is left out where none is installed."""
    programs = {program: shutil.which(program) for program in ("chromium", "chromedriver")}
    if programs["chromium"] is None:
        missing("chromium is not installed (Debian's package chromium)")
    if programs["chromedriver"] is None:
        missing("chromedriver is not installed (Debian's package chromium-driver)")
    options = ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(programs["chromedriver"]))
    try:
        driver.set_script_timeout(60)
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module", name="one_browser")
def make_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser of a module's tests."""
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(name="browser")
def watch_browser(one_browser: Browser) -> Iterator[Browser]:
    """The browser, in which nothing complained when the test is over."""
    one_browser.complaints()
    one_browser.resize(1280, 1000)
    yield one_browser
    assert one_browser.complaints() == []
