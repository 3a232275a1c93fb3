"""Pictures of the pages for the docs: docs/screenshots/*.png, from leaderboards/quick, in headless Chromium.

    python docs/make_screenshots.py

Needs the dev extra and Debian's chromium and chromium-driver. A palette keeps a picture small.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser, missing  # noqa: E402

BOARD = ROOT / "leaderboards" / "quick"
WIDTHS = {"desktop": 1280, "phone": 390}
TALLEST = {"desktop": 1500, "phone": 1700}


def main() -> None:
    if missing():
        sys.exit(missing())
    policies = sorted(path.name for path in (BOARD / "pages").glob("toxicity-rloo-*.html"))
    others = sorted(path.stem for path in (BOARD / "pages").glob("toxicity-dpo-*.html"))
    pages = {
        "board": ("index.html", "figures", 0),
        "figures": ("index.html#task=toxicity", "figures", "#figures"),
        "policy": (f"pages/{policies[0]}", "", 0),
        "compare": (f"pages/compare.html#a={policies[0].removesuffix('.html')}&b={others[0]}", "compared", 0),
    }
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            for size, width in WIDTHS.items():
                for name, (page, ready, part) in pages.items():
                    for dark in (False, True) if name == "board" and size == "desktop" else (False,):
                        browser.view(width, 900, dark)
                        browser.open(f"{BOARD.as_uri()}/{page}", ready)
                        top = browser.js("return document.querySelector(arguments[0]).getBoundingClientRect().top", part) if part else 0
                        data = browser.picture(TALLEST[size], int(top))
                        out = ROOT / "docs" / "screenshots" / f"{name}-{size}{'-dark' * dark}.png"
                        out.parent.mkdir(exist_ok=True)
                        Image.open(io.BytesIO(data)).convert("RGB").quantize(160).save(out, optimize=True)
                        print(f"{out.relative_to(ROOT)}  {out.stat().st_size / 1000:.0f} kB")
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
