"""Sounds and their metrics, a generator's run, and the file: what replaces what, and every kind of bad input."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from diffgap.generation.generated import GeneratedSet
from diffgap.generation.metrics.report import AudioReport, Figure
from diffgap.report import ReportOptions, write_report
from diffgap.report.sounds import choose
from tests.helpers import run
from tests.report.conftest import HOSTILE, RATE, SYSTEMS, Workshop, make_set
from tests.report.parsed import Element, parsed


def content(element: Element) -> bytes:
    return base64.b64decode(element.attributes["src"].partition(";base64,")[2])


@pytest.fixture
def made(workshop: Workshop, tmp_path: Path) -> Callable[..., Element]:
    """Makes the page of the generator's run and a set, with these options."""

    def make(generated: Path = workshop.set, **options: object) -> Element:
        write_report(
            workshop.generator,
            tmp_path / "page.html",
            generated=generated,
            options=ReportOptions(**options),  # type: ignore[arg-type]
        )
        return parsed(tmp_path / "page.html")

    return make


def test_a_generator_has_its_curves_and_sounds(made: Callable[..., Element]) -> None:
    page = made()
    assert [one.attributes["id"] for one in page.all("section")] == ["run", "training", "sounds", "metrics"]
    captions = [caption.text for caption in page.section("training").all("figcaption")]
    assert captions[0] == (
        "Loss on validation rows. The model kept is that of step 2: own condition 0.750, another's condition 1.250."
    )
    assert captions[1:] == ["Loss: 0.25 at step 4.", "Grad norm: 0.5 at step 4."]
    assert ["kind", "mel generator"] in page.section("run").table("The run")
    assert ["train.steps", "4", "20000"] in page.section("run").table("Settings other than the defaults")


def test_sounds_are_those_of_the_set_side_by_side(made: Callable[..., Element], workshop: Workshop) -> None:
    page, found = made().section("sounds"), GeneratedSet.open(workshop.set)
    cards, chosen = page.all("article"), choose(found, 12, 0)
    assert sorted(item.name for item in chosen) == [f"clip{i}" for i in range(5)]
    for card, item in zip(cards, chosen, strict=True):
        assert card.all("h3")[0].text == (item.caption or item.id)
        assert [caption.text for caption in card.all("figcaption")] == [f"{s}, {item.seconds:.1f} s" for s in SYSTEMS]
        for system, player, picture in zip(SYSTEMS, card.all("audio"), card.all("img"), strict=True):
            wave, rate = soundfile.read(io.BytesIO(content(player)))
            expected, _ = soundfile.read(found.path(system, item))
            assert rate == RATE and np.abs(wave - expected).max() <= 2.0**-15
            assert player.attributes["src"].startswith("data:audio/flac;base64,")
            assert player.attributes["aria-label"] == f"{system}: {item.caption or item.id}"
            assert picture.attributes["alt"].endswith(f"{system}, {item.caption or item.id}")
    made_of = dict(page.table("What the sounds are")[1:])
    assert list(made_of) == list(SYSTEMS) and "the bridge" in made_of["bridged"]
    assert page.table("How the set was made")[1:] == [
        ["generator", "<i>tiny</i>"], ["seed", "3"], ["steps", "the generator's own"], ["label", "none"],
    ]  # fmt: skip


def test_spectrograms_of_an_item_share_their_colours(made: Callable[..., Element], workshop: Workshop) -> None:
    """The systems are one tone at amplitudes 1, 1/2, 1/3: 80 dB are 255 colours."""
    card = made(items=1).section("sounds").all("article")[0]
    pictures = [np.asarray(Image.open(io.BytesIO(content(image)))).astype(int) for image in card.all("img")]
    (item,) = choose(GeneratedSet.open(workshop.set), 1, 0)
    peaks = [picture[:, picture.shape[1] // 2].max() for picture in pictures]
    for number, peak in enumerate(peaks, 1):
        assert peaks[0] - peak == pytest.approx(20 * np.log10(number) * 255 / 80, abs=1)
    # Low frequencies are below: the row of the tone, on Slaney's scale, which is linear up to 1 kHz at 200/3 Hz a mel.
    row = pictures[0][:, pictures[0].shape[1] // 2].argmax()
    top = 15 + np.log(RATE / 2 / 1000) / (np.log(6.4) / 27)
    hertz = 300 + 100 * int(item.name[4:])
    assert 64 - row == pytest.approx(hertz / (200 / 3) / top * 65, abs=1.5)


def test_hostile_words_stay_words(made: Callable[..., Element], workshop: Workshop, tmp_path: Path) -> None:
    page = made()
    assert HOSTILE in [title.text for title in page.all("h3")]
    assert not page.all("script") and not page.all("i")
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    run_folder = shutil.copytree(workshop.generator, tmp_path / "<b>run<b> $body")
    write_report(run_folder, tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    assert page.all("h1")[0].text == page.all("title")[0].text == "<b>run<b> $body: diffgap report"
    assert not page.all("b")


def test_the_seed_draws_the_items(made: Callable[..., Element], tmp_path: Path) -> None:
    many = make_set(tmp_path / "many", items=12, seconds=0.1).folder

    def titles(**options: object) -> list[str]:
        return [title.text for title in made(many, **options).section("sounds").all("h3")]

    whole = titles()
    assert len(set(whole)) == 12 and whole != sorted(whole)
    assert titles(items=4) == whole[:4] and titles(seed=1) != whole and titles() == whole
    assert "4 of 12 items, drawn by seed 0." in made(many, items=4).section("sounds").text


def test_a_page_holds_no_more_than_it_may(made: Callable[..., Element], workshop: Workshop, tmp_path: Path) -> None:
    size = len((made(), (tmp_path / "page.html").read_bytes())[1]) / 1e6
    page = made(megabytes=size / 2)
    count = len(page.section("sounds").all("article"))
    assert 1 <= count < 5
    assert f"{count} of 5 items, drawn by seed 0 (5 were asked for, but the page" in page.section("sounds").text
    assert len(made(megabytes=1e-6).section("sounds").all("article")) == 1


def test_systems_may_be_chosen(made: Callable[..., Element]) -> None:
    card = made(systems=("raw", "reference"), items=1).section("sounds").all("article")[0]
    assert [caption.text.partition(",")[0] for caption in card.all("figcaption")] == ["reference", "raw"]


def test_a_silent_sound_is_shown(made: Callable[..., Element], tmp_path: Path) -> None:
    found = make_set(tmp_path / "set", items=1)
    for system in SYSTEMS:
        soundfile.write(found.path(system, found.items[0]), np.zeros((800, 2)), RATE)
    assert len(made(found.folder).section("sounds").all("audio")) == 3


def audio_report(estimate: float) -> AudioReport:
    def figure(metric: str, better: str, **own: Any) -> Figure:
        return Figure(
            metric, "offline", "f", "p", 16000, 40, settings={}, better=better, confidence=0.95, resamples=10,
            resampling="clips", bias=None, reference="r", **own,
        )  # fmt: skip

    distance = figure("FD", "lower", against=40, estimate=estimate, low=estimate - 1, high=estimate + 1)
    return AudioReport((distance, figure("IS", "higher", against=0, estimate=1.25, low=None, high=None)), ("clip0",))


def test_metrics_beside_the_set_are_shown(made: Callable[..., Element], tmp_path: Path) -> None:
    found = make_set(tmp_path / "set", items=1)
    command = [code.text for code in made(found.folder).section("metrics").all("code")]
    assert command == [f"diffgap metrics {found.folder}"]
    systems = {}
    for name, estimate in (("bridged", 2.5), ("raw", 3.5)):
        audio_report(estimate).to_json(tmp_path / "one.json")
        systems[name] = json.loads((tmp_path / "one.json").read_text())
    del systems["raw"]["figures"][1]
    differences = [
        {"first": "raw", "second": "bridged", "metric": "FD", "backbone": "offline", "better": "lower",
         "estimate": -1.0, "low": low, "high": high} for low, high in ((-1.5, -0.25), (None, None))
    ]  # fmt: skip
    (found.folder / "metrics.json").write_text(json.dumps({"systems": systems, "differences": differences}))
    section = made(found.folder).section("metrics")
    assert section.table("Differences")[1:] == [
        ["bridged - raw", "FD", "offline", "lower", "-1.000 [-1.500, -0.2500]"],
        ["bridged - raw", "FD", "offline", "lower", "-1.000"],
    ]
    assert section.table("Metrics") == [
        ["metric", "backbone", "N", "against", "Hz", "better", "bridged", "raw"],
        ["FD", "offline", "40", "40", "16000", "lower", "2.500 [1.500, 3.500]", "3.500 [2.500, 4.500]"],
        ["IS", "offline", "40", "-", "16000", "higher", "1.250", "-"],
    ]
    (found.folder / "metrics.json").write_text('{"systems": {"raw": {"figures": [{"metric": "FD"}]}}}')
    with pytest.raises(ValueError, match=r"metrics.json is no file of `diffgap metrics`"):
        made(found.folder)


def test_what_the_page_may_replace(workshop: Workshop, tmp_path: Path) -> None:
    folder = shutil.copytree(workshop.generator, tmp_path / "run")
    assert run("report", folder) == 0
    page = folder / "report.html"
    assert run("report", folder, "--generated", workshop.set) == 0  # an earlier page
    assert len(parsed(page).all("audio")) == 15
    page.write_text("<html>mine</html>")
    assert run("report", folder) == 2 and page.read_text() == "<html>mine</html>"
    assert run("report", folder, "--overwrite") == 0 and parsed(page).all("h1")
    before = page.read_bytes()
    (folder / "metrics.jsonl").write_text("damaged\n{}\n")
    assert run("report", folder) == 2 and page.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def damaged(folder: Path) -> Path:
    found = make_set(folder / "damaged")
    found.path("raw", found.items[2]).write_bytes(b"RIFFjunk")
    return found.folder


def other_rate(folder: Path) -> Path:
    found = make_set(folder / "rate")
    soundfile.write(found.path("raw", found.items[2]), np.ones(100), 2 * RATE)
    return found.folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda w, f: [f], "is no run folder (no config.yaml); train one with `diffgap train`"),
        (lambda w, f: [w.generator, "-o", f], "is a folder; name a file for the page"),
        (lambda w, f: [w.generator, "--generated", f], "holds no set.json; make it with"),
        (lambda w, f: [w.generator, "--generated", w.set, "--systems", "sampled"], "systems names 'sampled'; "),
        (lambda w, f: [w.generator, "--generated", damaged(f)], "raw/clip2.wav cannot be read"),
        (lambda w, f: [w.generator, "--generated", other_rate(f)], "not of 8000 Hz; generate the set again"),
        (lambda w, f: [w.generator, "--items", 0], "items is 0; use 1 or more"),
        (lambda w, f: [w.generator, "--pairs", 1], "pairs is 1; use 2 or more"),
        (lambda w, f: [w.generator, "--megabytes", 0], "megabytes is 0.0; use a positive number"),
    ],
)
def test_bad_input_is_one_line_and_no_page(
    arguments: Callable[[Workshop, Path], list[object]],
    said: str,
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(workshop, tmp_path)
    output = [] if "-o" in given else ["-o", tmp_path / "page.html"]
    assert run("report", *given, *output) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))


def test_a_missing_package_is_named(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"soundfile is not installed; run: pip install 'diffgap\[generation\]'"
    ):
        write_report(workshop.generator, tmp_path / "page.html", generated=workshop.set)
