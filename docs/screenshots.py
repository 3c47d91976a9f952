"""Take the README's pictures of the demo's report: run from the repository's root.

    python docs/screenshots.py [DEMO]

DEMO is a folder that `memlaw write` made (default: demo, as `make demo` makes it). It needs
Debian's chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from memlaw.report import make_report

IMAGES = Path(__file__).resolve().parent / "img"
SHOTS = {  # width, height, pixels a point, colour scheme
    "light": (1200, 1480, 1.25, "light"),
    "dark": (1200, 1480, 1.25, "dark"),
    "phone": (390, 1640, 1.5, "light"),
}


def main() -> None:
    """Make the report, and a picture of its top for each of `SHOTS`."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        (page_file,) = make_report([source], Path(folder) / "report.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, scale, scheme) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                device_scale_factor=scale,
                color_scheme=scheme,
            )
            page.goto(page_file.as_uri())
            page.wait_for_selector("html[data-drawn]")
            page.screenshot(path=IMAGES / f"report-{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
