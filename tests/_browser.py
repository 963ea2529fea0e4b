"""A headless Chromium for tests of pages: skipped where none is installed, except that CI must have one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> tuple[str, str]:
    """Paths of the browser and its driver; skips the test where there are none, fails it where CI=true."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    missing = " and ".join(name for name, path in (("chromium", browser), ("chromedriver", driver)) if not path)
    reason = f"{missing} not found: apt-get install chromium chromium-driver"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def open_browser(width: int = 1280, height: int = 900, touch: bool = False, dark: bool = False) -> Iterator[Any]:
    """A selenium driver whose pages are `width` x `height` CSS pixels; with `touch`, as on a phone."""
    browser, driver_path = find_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.set_page_load_timeout(30)
        # The window's own size has a lower bound of about 500 pixels; the page's has none.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if touch else 1, "mobile": touch}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        if touch:
            driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def reload(driver: Any) -> None:
    """Load the page again and wait for the new one: the driver may answer before it is there, from the old one even."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.execute_script("window.stale = true")
    driver.refresh()
    loaded = "return !window.stale && document.readyState === 'complete'"
    WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda d: d.execute_script(loaded))
