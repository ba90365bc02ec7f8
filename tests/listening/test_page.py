"""The page in headless Chromium, opened from a file: what a listener does, hears and saves."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgap.listening.answers import read_key, read_sessions
from diffgap.listening.design import Settings
from diffgap.listening.page import KEY, PAGE, write_test
from diffgap.listening.score import score
from tests.listening.conftest import HOSTILE, make_set

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_test(make_set(folder / "set", seconds=0.2), folder / "page", Settings(repeats=2, catch=2, ties=True))
    return folder / "page"


@pytest.fixture(scope="module")
def mushra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mushra")
    found = make_set(folder / "set", seconds=0.2, count=2)
    write_test(found, folder / "page", Settings("mushra", repeats=0))
    return folder / "page"


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a test in a browser without a network and with nothing kept; nothing that it does may be an error."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def act(folder: Path, **options: Any) -> Page:
        address = (folder / PAGE).as_uri()
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url == address or request.url.startswith(("data:", "blob:"))
                else wrong.append(request.url)
            ),
        )
        page.goto(address)
        return page

    yield act
    for context in contexts:
        context.close()
    assert wrong == []


def until(page: Page, condition: str) -> None:
    """Waits for a JavaScript condition; the page's policy forbids the browser to evaluate one by itself."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def begun(page: Page, participant: str = "p1") -> None:
    assert page.evaluate("document.activeElement.id") == "participant"
    page.keyboard.type(participant)
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#task")).to_have_text(f"Trial 1 of {page.evaluate('schedule.length')}")


def hear(page: Page, keys: str) -> None:
    """Plays each sound of the trial by its key until it counts as heard."""
    for key in keys:
        page.keyboard.press(key)
        until(page, f"player.whole(stimuli().find((id) => letter(id) === '{key.upper()}'))")


def saved(page: Page, folder: Path, act: Callable[[], Any]) -> Path:
    with page.expect_download() as found:
        act()
    file = folder / found.value.suggested_filename
    found.value.save_as(file)
    return file


def test_a_session_by_keyboard_alone(opened: Open, pairs: Path, tmp_path: Path) -> None:
    page = opened(pairs)
    begun(page)
    key = json.loads((pairs / KEY).read_text())
    systems = {name: system for trial in key["trials"] for name, system in trial["stimuli"].items()}
    preferred = {"bridged": 2, "reference": 2, "raw": 1, "foil": 0}
    for number in range(9):
        assert page.inner_text("#task") == f"Trial {number + 1} of 9"
        assert page.evaluate("document.activeElement.id") == "task"
        hear(page, "ab")
        order = page.evaluate("trial().order")
        better = max((0, 1), key=lambda side: preferred[systems[order[side]]])
        page.keyboard.press("12"[better])  # the first question
        page.keyboard.press("45"[better] if "reference" in (systems[name] for name in order) else "6")
        page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "thanks"
    file = saved(page, tmp_path, lambda: page.keyboard.press("s"))
    assert file.name == f"answers-p1-{key['digest'][:8]}.json"
    assert page.inner_text("#saved") == f"Saved as {file.name}."
    opened_key = read_key(pairs)
    (session,) = read_sessions([file], opened_key)
    assert [one.order for one in session.answers] == [tuple(one["order"]) for one in page.evaluate("schedule")]
    assert all(one.plays == 2 and one.seconds > 0 for one in session.answers)
    found = score(opened_key, [session])
    fit, quality = found.preferences
    assert (fit.share.estimate, fit.answers.above, fit.answers.ties) == (1.0, 5, 0)
    assert (quality.share.estimate, quality.answers.ties) == (0.5, 5)
    assert (found.listeners[0].checks, found.listeners[0].failed, found.listeners[0].agreement) == (4, 0, 1.0)
    assert fit.first_side in (0.4, 0.6, 0.2, 0.8)
    content = json.loads(file.read_text())
    assert content["started"] < content["finished"]
    assert all(heard >= 0.15 for one in content["trials"] for heard in one["heard"].values())


def test_a_mushra_session(opened: Open, mushra: Path, tmp_path: Path) -> None:
    page = opened(mushra)
    begun(page, "listener_2")
    key = json.loads((mushra / KEY).read_text())
    systems = {name: system for trial in key["trials"] for name, system in trial["stimuli"].items()}
    target = {"reference": 100, "bridged": 60, "raw": 40, "anchor 3.5 kHz": 0, "anchor 7 kHz": 51}
    for _ in range(2):
        hear(page, "r")
        for number, name in enumerate(page.evaluate("trial().order")):
            hear(page, str(number + 1))
            slider = page.locator(f"[data-score='{name}']")
            assert slider.evaluate("(one) => document.activeElement === one")
            assert slider.get_attribute("aria-valuetext") == "not rated yet"
            wanted = target[systems[name]]
            page.keyboard.press({100: "End", 60: "PageUp", 40: "PageDown", 0: "Home", 51: "ArrowRight"}[wanted])
            grade = {100: "Excellent", 60: "Good", 40: "Fair", 0: "Bad", 51: "Fair"}[wanted]
            assert slider.get_attribute("aria-valuetext") == f"{wanted}, {grade}"
        page.keyboard.press("n")
    file = saved(page, tmp_path, lambda: page.click("#save"))
    opened_key = read_key(mushra)
    found = score(opened_key, read_sessions([file], opened_key))
    assert {one.system: one.mean.estimate for one in found.ratings} == target
    assert found.listeners[0].failed == 0


def test_no_step_is_left_out(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    page.keyboard.press("Enter")  # no participant
    assert page.locator("#trial").is_hidden()
    page.fill("#participant", "a b")
    page.click("text=Start")
    assert page.locator("#trial").is_hidden()
    page.fill("#participant", "")
    begun(page)
    lacking = page.locator("#lacking")
    page.keyboard.press("n")
    assert lacking.inner_text() == "Listen to the whole of: A, B."
    assert page.evaluate("document.activeElement.dataset.sound") == page.evaluate("trial().order[0]")
    page.keyboard.press("1")
    hear(page, "a")
    page.click("#next")
    assert lacking.inner_text() == "Listen to the whole of: B."
    hear(page, "b")
    page.keyboard.press("n")
    assert lacking.inner_text().startswith("Not answered yet: Which sounds better")
    assert page.evaluate("document.activeElement.name") == "quality"
    page.keyboard.press("Space")  # answers it, as in every form
    assert lacking.inner_text() == ""
    page.keyboard.press("Enter")
    assert page.inner_text("#task") == "Trial 2 of 9"
    assert page.evaluate("state.records[0].answers") == {
        "fit": page.evaluate("state.records[0].order[0]"),
        "quality": page.evaluate("state.records[0].order[0]"),
    }


def test_a_closed_page_goes_on(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    begun(page)
    hear(page, "ab")
    for key in "14n":
        page.keyboard.press(key)
    hear(page, "a")
    page.keyboard.press("2")
    page.keyboard.press("p")
    before = page.evaluate("JSON.stringify([state.records, state.current.answers, state.current.plays, schedule])")
    page.reload()
    assert page.inner_text("#task") == "Trial 2 of 9" and page.inner_text("#place") == "Listener p1"
    assert page.locator("#trial input:checked").count() == 1
    after = page.evaluate("JSON.stringify([state.records, state.current.answers, state.current.plays, schedule])")
    assert after == before
    page.keyboard.press("n")
    assert page.inner_text("#lacking") == "Listen to the whole of: B."


def test_sounds_change_in_step_and_loop(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    begun(page)
    gains = "[...player.voices.values()].map((voice) => voice.gain.gain.value)"
    pressed = "[...document.querySelectorAll('#sounds button')].map((one) => one.ariaPressed)"
    page.keyboard.press("a")
    until(page, f"JSON.stringify({gains}) === '[1,0]'")
    start = page.evaluate("player.begun")
    until(page, "player.context.currentTime > player.begun + 2 * player.length")  # it loops
    page.keyboard.press("b")
    until(page, f"{gains}[0] < 1e-3 && {gains}[1] > 0.999")
    assert page.evaluate(pressed) == ["false", "true"]
    assert page.evaluate("player.begun") == start  # the clock of both is one, and runs on
    assert page.evaluate("[...player.voices.values()].every((voice) => voice.source.loop)")
    page.keyboard.press("p")
    assert page.evaluate("player.running") is False and page.evaluate(pressed) == ["false", "false"]
    assert 0 <= page.evaluate("player.position") < page.evaluate("player.length")
    counted = page.evaluate("JSON.stringify(state.current.heard)")
    page.wait_for_timeout(150)
    assert page.evaluate("JSON.stringify(state.current.heard)") == counted
    assert page.locator("#pause").inner_text().startswith("Play")


def test_orders_are_balanced_and_of_the_participant(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    key = json.loads((pairs / KEY).read_text())
    trials = {trial["id"]: trial for trial in key["trials"]}
    orders = [page.evaluate(f"ordered('listener{number}')") for number in range(40)]
    assert page.evaluate("ordered('listener3')") == orders[3]
    assert len({json.dumps(order) for order in orders}) == 40
    first = []
    for order in orders:
        assert sorted(one["id"] for one in order) == sorted(trials)
        firsts = [trials[one["id"]]["stimuli"][one["order"][0]] for one in order]
        assert abs(firsts.count("raw") - firsts.count("bridged")) == 1  # 7 trials
        assert firsts.count("reference") == firsts.count("foil") == 1
        places: dict[str, list[int]] = {}
        for place, one in enumerate(order):
            places.setdefault("".join(sorted(one["order"])), []).append(place)
        apart = [later - earlier for earlier, later in (found for found in places.values() if len(found) == 2)]
        assert len(apart) == 2 and min(apart) >= 3
        first.append(order[0]["id"])
    assert len(set(first)) >= 6  # of 9 trials
    for name in trials:
        sides = [next(one["order"] for one in order if one["id"] == name)[0] for order in orders]
        assert 8 <= sides.count(sides[0]) <= 32


def test_captions_are_text(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    assert page.title() == "Listening test"
    begun(page)
    page.evaluate(f"(schedule[0].caption = {json.dumps(HOSTILE)}, show())")
    assert page.inner_text("#caption") == " ".join(HOSTILE.split())
    assert page.locator("#caption *").count() == 0 and page.title() == "Listening test"


def test_shortcuts_can_be_turned_off(opened: Open, pairs: Path) -> None:
    page = opened(pairs)
    begun(page)
    page.click("#help summary")
    assert page.locator("#keys dt").count() == 5
    page.uncheck("#shortcuts")
    page.keyboard.press("a")
    page.keyboard.press("1")
    assert page.evaluate("player.running || Object.keys(state.current.answers).length") in (0, False)
    assert page.locator("kbd:visible").count() == 0
    page.locator("#sounds button").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("player.running")


def test_every_control_has_a_name_and_a_focus_ring(opened: Open, mushra: Path) -> None:
    page = opened(mushra)
    begun(page)
    unnamed = (
        "[...document.querySelectorAll('input, button, progress')].filter("
        "(one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())"
    )
    assert page.evaluate(f"{unnamed}.length") == 0
    reached = []
    for _ in range(13):
        page.keyboard.press("Tab")
        reached.append(page.evaluate('document.activeElement.outerHTML.match(/data-\\w+|id="\\w+|summary/)[0]'))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["data-sound", *["data-sound", "data-score"] * 5, 'id="next', "summary"]


def test_another_listener(opened: Open, mushra: Path) -> None:
    page = opened(mushra)
    begun(page)
    page.evaluate("(state.records = schedule.map(() => ({})), keep(), show())")
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.click("#again")
    assert asked == ["The answers are not saved. Forget them?"] and page.locator("#end").is_visible()
    page.keyboard.press("s")
    page.click("#again")
    assert page.locator("#start").is_visible() and page.evaluate("localStorage.length") == 0
    page.reload()
    assert page.locator("#start").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("method", ["pairs", "mushra"])
def test_fits_every_screen(opened: Open, request: pytest.FixtureRequest, method: str, width: int, scheme: str) -> None:
    page = opened(request.getfixturevalue(method), viewport={"width": width, "height": 800}, color_scheme=scheme)
    begun(page)
    page.evaluate("(schedule[0].caption = 'a long caption '.repeat(20) + 'x'.repeat(90), show())")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    shades = page.evaluate(
        "[document.body, document.querySelector('#sounds button')].flatMap((one) => "
        "[getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
    )
    light = [sum(map(int, shade[4:-1].split(","))) > 384 for shade in shades]
    assert light == ([True, False] * 2 if scheme == "light" else [False, True] * 2)
