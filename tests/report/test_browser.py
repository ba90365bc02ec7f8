"""The page from a file in headless Chromium: nothing is asked for, nothing complained of, and sounds play."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgap.report import ReportOptions, write_report
from tests.report.conftest import HOSTILE, Workshop

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

Page = Any


@pytest.fixture(scope="module")
def file(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("browser") / "page.html"
    write_report(workshop.run, page, generated=workshop.set, options=ReportOptions(items=5))
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page in a window of some kind; the browser may neither complain nor ask for anything but the file."""
    pages, complaints, asked = [], [], []

    def open_page(**options: Any) -> Page:
        page = browser.new_page(**options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url) if request.url[:5] != "data:" else None)
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == [] and asked == [file.as_uri()] * len(pages)


def until(page: Page, condition: str) -> None:
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def test_sounds_play_and_pictures_load(opened: Any) -> None:
    page = opened()
    until(page, "[...document.querySelectorAll('audio')].every((sound) => sound.readyState >= 1)")
    lengths = page.evaluate("[...document.querySelectorAll('audio')].map((sound) => sound.duration)")
    told = page.locator(".sounds figcaption").all_inner_texts()
    assert len(lengths) == 15
    for length, words in zip(lengths, told, strict=True):
        assert words.endswith(f", {length:.1f} s")
    until(page, "[...document.images].every((image) => image.complete && image.naturalHeight === 64)")
    page.evaluate("document.querySelector('audio').muted = true; document.querySelector('audio').play()")
    until(page, "document.querySelector('audio').currentTime > 0")


def test_tables_and_charts_are_seen_and_words_are_harmless(opened: Any) -> None:
    page = opened()
    assert page.title() == "run: diffgap report"
    assert HOSTILE in page.locator("article h3").all_inner_texts()
    for table in page.locator("section > .scroll").all():
        box = table.bounding_box()
        assert box["width"] > 300 and box["height"] > 40
    for chart in page.locator("svg").all():
        box = chart.bounding_box()
        assert box["width"] > 150 and box["height"] > 80
    assert not page.locator("section details table").first.is_visible()
    page.locator("summary").first.press("Enter")
    assert page.locator("section details table").first.is_visible()


def test_the_keyboard_reaches_sections_tables_and_players(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#run"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.locator("nav a").last.press("Enter")
    assert page.url.endswith("#metrics")
    page.locator("article").first.locator("audio").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "AUDIO"
    unnamed = (
        "[...document.querySelectorAll('audio, [tabindex], svg, img')].filter((one) => !one.ariaLabel && !one.alt)"
    )
    assert page.evaluate(f"{unnamed}.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1300])
def test_fits_every_screen(opened: Any, width: int, scheme: str) -> None:
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    first, second = (page.locator("#gap svg").nth(i).bounding_box() for i in range(2))
    assert (first["y"] == second["y"]) == (width == 1300)
    shades = page.evaluate(
        "[[document.body, 'backgroundColor'], [document.body, 'color'], [document.querySelector('figure'), "
        "'backgroundColor'], [document.querySelector('svg text'), 'fill']].map(([one, what]) => "
        "getComputedStyle(one)[what])"
    )
    light = [sum(map(int, shade[4:-1].split(","))) > 384 for shade in shades]
    assert light == ([True, False] * 2 if scheme == "light" else [False, True] * 2)


def test_prints_in_ink_on_white(opened: Any) -> None:
    page = opened(viewport={"width": 760, "height": 1000}, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 760
    for what, shade in (("backgroundColor", "rgb(255, 255, 255)"), ("color", "rgb(28, 29, 31)")):
        assert page.evaluate(f"getComputedStyle(document.body).{what}") == shade
    assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(28, 29, 31)"
    assert not page.locator("nav").is_visible() and not page.locator("audio").first.is_visible()
    wide = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth + 1).length"
    assert page.evaluate(wide) == 0
