"""Makes the pictures of docs/images from a report, in the browser that the tests use.

    python docs/generate_images.py REPORT.html

REPORT.html is what ``svdbank report`` wrote of a bank and of adapters of it that ``svdbank train`` made, so that every section
is there. The ones committed are of SmolLM2-135M with a bank of rank 128, two adapters of 20 steps each, one on top of the other,
and a plain LoRA.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

TARGET = Path(__file__).with_name("images")

#: Name → theme, width and height of the window, and the heading that stands at its top.
PICTURES = {
    "report-light": ("light", 1280, 800, "The minor end of the spectrum"),
    "report-dark": ("dark", 1280, 800, "Angles and conflict"),
    "report-narrow": ("light", 400, 800, "Losses before and after"),
}


def picture(browser: Browser, page_url: str, name: str) -> None:
    """One window of the report as a PNG."""
    theme, width, height, heading = PICTURES[name]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
    page.goto(page_url)
    found = page.get_by_role("heading", name=heading, exact=True)
    if not found.count():
        raise SystemExit(f"the report has no section {heading!r}: name one of a bank and of adapters that train made")
    found.first.evaluate(
        "e => window.scrollTo({top: e.getBoundingClientRect().top + window.scrollY - 24, behavior: 'instant'})"
    )
    page.screenshot(path=TARGET / f"{name}.png")
    page.close()


def main(report: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.reporting.chromium import HINT, found

    executable = found()
    if executable is None:
        raise SystemExit(HINT)
    TARGET.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        for name in PICTURES:
            picture(browser, Path(report).resolve().as_uri(), name)
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
