"""A real Chromium for tests: started once, emptied between tests, told what it asked for and what it complained of."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str:
    """Why there is no browser; "" where there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} (apt-get install chromium chromium-driver)" if lacking else ""


class Browser:
    """One window. `open` waits until the page says that it is ready; `errors` and `asked` are about what was opened last."""

    def __init__(self, profile: Path) -> None:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
        self.view()

    def view(self, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})

    def open(self, url: str, ready: str = "") -> None:
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(url)
        if ready:
            self.until(lambda: self.js("return document.documentElement.dataset.ready") == ready, f"{url} is {ready}")

    def js(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def until(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 20
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"not within 20 s: {what}; {self.errors()}")
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        return [
            str(text) for text in self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.trim())", selector)
        ]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def asked(self) -> set[str]:
        """Addresses of all requests since `open`."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(message["params"]["request"]["url"])
        return found

    def faults(self) -> list[str]:
        """What axe-core calls serious or critical."""
        self.js(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
        run = "const done = arguments[0]; axe.run().then((found) => done(found.violations))"
        found = self.driver.execute_async_script(run)
        return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")]

    def picture(self, tallest: int, top: int = 0) -> bytes:
        """The page as PNG from `top` down, as wide as the window, at most so many pixels tall."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": top, "width": self.js("return innerWidth"), "height": min(tallest, size["height"] - top), "scale": 1}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        return base64.b64decode(taken["data"])

    def quit(self) -> None:
        self.driver.quit()
