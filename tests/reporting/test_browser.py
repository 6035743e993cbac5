"""A report in a real browser: it renders in light and dark, at every width and in print, asks for nothing, and axe finds no fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svdbank.verbs.report import WrittenReport
from tests.reporting import chromium
from tests.structure.source import ROOT

#: Milliseconds. A busy machine may take long to start a browser; no test measures how long.
PATIENCE = 240_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = chromium.found()
    if executable is None:
        pytest.fail(chromium.HINT, pytrace=False)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--disable-dev-shm-usage"], timeout=PATIENCE)
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser: Any, everything: WrittenReport) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of everything, what it asked for, and what the console said."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_default_timeout(PATIENCE)
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.goto(Path(everything.path).as_uri(), wait_until="load")
    yield page, asked, said
    page.close()


def test_it_renders_asks_for_nothing_and_says_nothing(opened: Any, everything: WrittenReport) -> None:
    page, asked, said = opened
    assert asked == [Path(everything.path).as_uri()] and said == []
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert len(drawn) == everything.figures and all(width > 250 and height > 60 for width, height in drawn)
    # Text of figures is text, in the page's colour.
    assert page.evaluate("document.querySelectorAll('figure > svg text').length") > 5 * everything.figures
    assert page.evaluate("document.title") == "1 unfinished build, 1 bank, 4 adapters, 1 evaluation"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(scheme: str, opened: Any) -> None:
    """WCAG 2.2 AA and axe's best practices: contrast, labels, headings, landmarks, tables; in the dark, contrast, which alone differs."""
    import axe_playwright_python

    page, _, _ = opened
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    rules = "document, {runOnly: ['color-contrast']}" if scheme == "dark" else ""
    found = page.evaluate(
        f"axe.run({rules}).then(r => r.violations.map(v => [v.id, v.help, v.nodes.slice(0, 3).map(n => n.html)]))"
    )
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    assert found == [], json.dumps(found, indent=1)[:3000]


@pytest.mark.parametrize("width", [320, 400, 1000, 1600])
def test_no_width_scrolls_sideways(width: int, opened: Any) -> None:
    page, _, _ = opened
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Letters of figures stay readable: 9 units of text and more, at the scale at which the figure is shown.
    scales = page.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert min(scales) > 0.7


def test_a_keyboard_reaches_the_content_and_opens_the_numbers(opened: Any) -> None:
    page, _, _ = opened
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.evaluate("document.querySelector('summary').focus()")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open") is True
    page.keyboard.press("Enter")


def test_print_is_light_and_whole(opened: Any) -> None:
    page, _, _ = opened
    page.set_viewport_size({"width": 800, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    shown = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " [...document.querySelectorAll('.scroll')].filter(e => e.offsetParent && e.scrollHeight > e.clientHeight + 2).length]"
    )
    page.emulate_media(media="screen", color_scheme="light")
    assert shown == ["rgb(255, 255, 255)", "rgb(24, 32, 42)", 0]


def _themes() -> list[dict[str, str]]:
    text = (ROOT / "svdbank" / "reporting" / "report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\n\s*\}", text, re.S)[:2]
    )
    return [light, dark]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_figures_have_the_contrast_that_axe_does_not_measure(theme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what has to be seen to understand a figure."""
    colours = _themes()[theme]
    for text in ("ink", "muted", "accent"):
        assert _contrast(colours[text], colours["card"]) >= 4.5, text
    for name in [f"s{i}" for i in range(8)] + [f"l{i}" for i in range(9)]:
        assert _contrast(colours[name], colours["card"]) >= 3.0, name
    # Ramps are steps of lightness, so that they are read without any colour.
    steps = [_luminance(colours[f"q{i}"]) for i in range(9)]
    assert steps == sorted(steps, reverse=theme == 0)
    steps = [_luminance(colours[f"l{i}"]) for i in range(9)]
    assert steps == sorted(steps, reverse=True)
