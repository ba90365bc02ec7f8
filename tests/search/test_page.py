"""The page in headless Chromium: what a person does and sees."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgap.search import server as server_module
from diffgap.search.index import SearchIndex, build_index
from diffgap.search.server import SearchServer
from tests.search.conftest import Workshop, serving, write_tone

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(workshop: Workshop) -> Iterator[SearchServer]:
    with serving(workshop) as found:
        yield found


@pytest.fixture
def page(browser: Any, server: SearchServer) -> Iterator[Page]:
    """The page, loaded; nothing that it does may be an error to the browser."""
    found = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    foreign: list[str] = []
    found.on("request", lambda request: foreign.append(request.url) if not own(request.url, server) else None)
    found.complaints = complaints
    opened(found, server)
    yield found
    found.close()
    assert complaints == [] and foreign == []


def own(url: str, server: SearchServer) -> bool:
    return url.startswith((server.url, "blob:", "data:"))


def opened(page: Page, server: SearchServer) -> None:
    page.goto(server.url)
    playwright.expect(page.locator("#about")).to_contain_text("sounds")


def captions(page: Page, column: int) -> list[str]:
    return page.locator(f"#results section:nth-child({column}) .name").all_text_contents()


def sought(page: Page, words: str) -> None:
    page.fill("#text", words)
    page.press("#text", "Enter")
    playwright.expect(page.locator("#said")).to_have_text(f"Nearest to “{words}”:")


def until(page: Page, condition: str) -> None:
    """Waits for a JavaScript condition; the page's policy forbids the browser to evaluate one by itself."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def test_a_caption_is_typed(page: Page, server: SearchServer) -> None:
    assert page.locator("#about").inner_text() == "72 sounds, before and after bridging"
    assert page.evaluate("document.activeElement.id") == "text"
    sought(page, "a dog barks")
    expected = server.search("text", server_module.Source(text="a dog barks"), 10)
    for column, name in ((1, "before"), (2, "after")):
        assert captions(page, column) == [item["caption"] for item in expected[name]]
    assert page.locator("#results h2").all_text_contents() == ["Before bridging", "After bridging"]
    scores = page.locator("#results section:nth-child(2) .score span:first-child").all_text_contents()
    assert scores == [f"{item['score']:.3f}" for item in expected["after"]]
    assert page.locator("#results b").count() == 0  # captions are text, whatever stands in them
    places = [item["row"] for item in expected["before"]]
    moved = page.locator("#results section:nth-child(2) .score span:last-child").all_text_contents()
    for place, (item, said) in enumerate(zip(expected["after"], moved, strict=True)):
        was = places.index(item["row"]) if item["row"] in places else None
        assert said == ("new here" if was is None else "same place" if was == place else f"was {was + 1}")


def test_sounds_play_and_pictures_load(page: Page) -> None:
    responses: dict[str, int] = {}
    page.on("response", lambda answer: responses.update({answer.url: answer.status}))
    sought(page, "something to hear")
    until(page, "[...document.querySelectorAll('audio')].every((sound) => sound.readyState >= 1)")
    assert page.locator("audio").count() > 0
    assert page.evaluate("[...document.querySelectorAll('audio')].map((sound) => sound.duration)")[0] == pytest.approx(
        0.3
    )
    until(page, "[...document.images].every((image) => image.complete && image.naturalWidth === 16)")
    media = {status for url, status in responses.items() if "/media/" in url}
    assert media <= {200, 206} and media
    page.evaluate("document.querySelector('audio').muted = true; document.querySelector('audio').play()")
    until(page, "document.querySelector('audio').currentTime > 0")


def test_a_sound_is_dropped(page: Page, server: SearchServer, workshop: Workshop) -> None:
    content = list((workshop.media / "sounds/07.wav").read_bytes())
    dropped = page.evaluate_handle(
        """(content) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(content)], "a tone.wav", { type: "audio/wav" }));
            return carried;
        }""",
        content,
    )
    page.dispatch_event("#drop", "dragenter", {"dataTransfer": dropped})
    assert page.evaluate("document.body.className") == "dragging"
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    playwright.expect(page.locator("#said")).to_have_text("Nearest to a tone.wav:")
    expected = server.search("audio", server_module.Source(data=bytes(content)), 10)
    assert captions(page, 1) == [item["caption"] for item in expected["before"]]
    assert "sounds are not bridged here" in page.locator("#results section p").first.inner_text()
    until(page, "document.querySelector('#asked audio').readyState >= 1")


def test_a_picture_is_chosen(page: Page, workshop: Workshop) -> None:
    page.set_input_files("#file", workshop.media / "03.png")
    playwright.expect(page.locator("#said")).to_have_text("Nearest to 03.png:")
    assert page.locator("#results h2").all_text_contents() == ["Before bridging", "After bridging"]
    until(page, "document.querySelector('#asked img').naturalWidth === 16")
    sought(page, "words again")
    assert not page.locator("#asked").is_visible()


def test_errors_are_said_in_the_page(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = page.locator("#error")
    page.click("#go")
    playwright.expect(error).to_have_text("Type a few words to search for.")
    (tmp_path / "notes.txt").write_text("x")
    page.set_input_files("#file", tmp_path / "notes.txt")
    playwright.expect(error).to_have_text("notes.txt is neither a sound nor a picture.")
    (tmp_path / "film.mp4").write_bytes(b"x")
    page.set_input_files("#file", tmp_path / "film.mp4")
    playwright.expect(error).to_contain_text("This index takes no videos")
    page.evaluate("about.upload_limit = 1000")
    write_tone(tmp_path / "long.wav", 300)
    page.set_input_files("#file", tmp_path / "long.wav")
    playwright.expect(error).to_contain_text("long.wav is too large")
    assert page.complaints == []
    (tmp_path / "broken.wav").write_bytes(b"RIFFjunk")
    page.set_input_files("#file", tmp_path / "broken.wav")
    playwright.expect(error).to_contain_text("is no sound that can be read")
    assert page.locator("#results li").count() == 0
    sought(page, "and on")
    playwright.expect(error).to_be_hidden()
    # The browser itself reports the answer 400, and that the broken sound's preview cannot play.
    assert all("400" in said or "broken" in said or "blob" in said for said in page.complaints)
    page.complaints.clear()


def test_a_server_that_is_gone_is_said(page: Page) -> None:
    page.context.set_offline(True)
    page.fill("#text", "anyone?")
    page.click("#go")
    playwright.expect(page.locator("#error")).to_contain_text("The server does not answer")
    page.complaints.clear()  # the browser's own, of a request that failed


def test_the_keyboard_reaches_everything(page: Page) -> None:
    sought(page, "keys")
    page.focus("#text")
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["count", "go", "file"]
    outline = page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "AUDIO"
    unnamed = (
        "[...document.querySelectorAll('input, select, audio')].filter((one) => !one.labels?.length && !one.ariaLabel)"
    )
    assert page.evaluate(f"{unnamed}.length") == 0


def test_the_number_of_results_is_chosen(page: Page) -> None:
    page.select_option("#count", "5")
    sought(page, "few")
    assert len(captions(page, 1)) == len(captions(page, 2)) == 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_fits_every_screen(browser: Any, server: SearchServer, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened(page, server)
    sought(page, "wide and narrow")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    columns = page.locator("#results section")
    first, second = (columns.nth(i).bounding_box() for i in range(2))
    assert (first["y"] == second["y"]) == (width == 1400)
    shades = page.evaluate(
        "[document.body, document.querySelector('li')].flatMap((one) => "
        "[getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
    )
    light = [sum(map(int, shade[4:-1].split(","))) > 384 for shade in shades]
    assert light == ([True, False] * 2 if scheme == "light" else [False, True] * 2)
    page.close()


def test_an_index_without_a_bridge_or_encoders(browser: Any, workshop: Workshop, tmp_path: Path) -> None:
    build_index(workshop.store, tmp_path / "index", modality="audio", encoders={"audio": "tests.search.encoders:Tones"})
    with serving(workshop, SearchIndex.open(tmp_path / "index")) as server:
        page = browser.new_page()
        opened(page, server)
        assert page.locator("#text").is_disabled() and page.locator("#go").is_disabled()
        assert page.locator("#drop-says").inner_text() == "Drop a sound here, or choose a file"
        page.set_input_files("#file", workshop.media / "sounds/07.wav")
        playwright.expect(page.locator("#said")).to_have_text("Nearest to 07.wav:")
        assert page.locator("#results h2").all_text_contents() == ["Nearest"]
        assert page.locator("#results audio").count() == 0  # no folder of media was named
        page.close()
