"""Statistics against scipy and known numbers, and answers that are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, t

from diffgap.generation.generated import GeneratedSet
from diffgap.listening.answers import Key, read_key, read_sessions
from diffgap.listening.design import FOIL, Settings
from diffgap.listening.page import ANSWERS_FORMAT, KEY, write_test
from diffgap.listening.report import as_json, markdown
from diffgap.listening.score import Scores, score
from diffgap.listening.statistics import crossed_bootstrap, preference_interval, sign_test, wilson
from tests.helpers import run
from tests.listening.conftest import make_set

Answer = Callable[[Any, str, int], Any]
"""(trial of the key, question or system, presentation 0 or 1) -> chosen system, "tie" or score."""


def answer(folder: Path, participant: str, choose: Answer) -> Path:
    """A file of answers such as the page saves."""
    key = json.loads((folder / KEY).read_text())
    seen: dict[str, int] = {}
    trials = []
    for trial in key["trials"]:
        names = {system: name for name, system in trial["stimuli"].items()}
        time = seen.get(trial["item"], 0)
        seen[trial["item"]] = time + (not trial["catch"])
        asked = key["questions"] or names
        chosen = {one: choose(trial, one, time) for one in asked}
        answers = (
            {one: names.get(value, value) for one, value in chosen.items()}
            if key["questions"]
            else {names[one]: value for one, value in chosen.items()}
        )
        heard = [*trial["stimuli"], *([trial["reference"]] if trial["reference"] else [])]
        trials.append(
            {
                "trial": trial["id"], "order": list(trial["stimuli"]), "answers": answers,
                "plays": dict.fromkeys(heard, 2), "heard": dict.fromkeys(heard, 0.3), "seconds": 30.0,
            }
        )  # fmt: skip
    content = {"format": ANSWERS_FORMAT, "digest": key["digest"], "method": key["method"], "participant": participant}
    file = folder.parent / f"answers-{participant}.json"
    file.write_text(json.dumps({**content, "started": "", "finished": "", "trials": trials}))
    return file


def right(trial: Any, other: str) -> str:
    return "reference" if trial["catch"] else other


@pytest.fixture
def pairs(generated: GeneratedSet, tmp_path: Path) -> Path:
    write_test(generated, tmp_path / "page", Settings(ties=True))
    return tmp_path / "page"


def scored(folder: Path, *files: Path) -> Scores:
    key = read_key(folder)
    return score(key, read_sessions(files, key))


def test_sign_test_is_scipys() -> None:
    found = sign_test(np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 4))
    assert found == (9, 2, 4, pytest.approx(binomtest(9, 11).pvalue, rel=1e-12))
    assert found.p == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert sign_test(np.zeros(3)) == (0, 0, 3, 1.0)


@pytest.mark.parametrize(("wins", "count"), [(8, 10), (0, 10), (10, 10), (1, 3)])
def test_wilson_is_scipys(wins: int, count: int) -> None:
    expected = binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins / count, count) == pytest.approx((wins / count, expected.low, expected.high), abs=1e-12)


def test_crossed_bootstrap_has_the_known_variance() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1, 400))
    found = crossed_bootstrap(values, resamples=4000)
    low, high = t.interval(0.95, 399, values.mean(), values.std() / 20)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    # 20 listeners of one opinion each: as uncertain as 20 answers, however many items they heard.
    opinions = np.repeat(generator.normal(size=(20, 1)), 30, axis=1)
    wide, narrow = (crossed_bootstrap(one, resamples=4000) for one in (opinions, opinions.reshape(1, -1)))
    spread = 2 * 1.96 * opinions[:, 0].std() / math.sqrt(20)
    assert wide.high - wide.low == pytest.approx(spread, rel=0.06)
    assert narrow.high - narrow.low == pytest.approx(spread / math.sqrt(30), rel=0.06)
    assert crossed_bootstrap(opinions.T) == pytest.approx(wide, abs=0.05)
    assert math.isnan(crossed_bootstrap(np.ones((1, 1))).low)


def test_a_unanimous_preference_is_not_certain() -> None:
    found = preference_interval(np.ones((2, 5)))
    assert found == pytest.approx((1.0, binomtest(10, 10).proportion_ci(method="wilson").low, 1.0))
    clustered = preference_interval(np.repeat([[1.0], [0.0], [1.0], [1.0]], 50, axis=1))
    assert clustered.low < wilson(0.75, 200).low - 0.1


def test_preferences(pairs: Path) -> None:
    items = {name: number for number, name in enumerate(sorted({one["item"] for one in read_items(pairs)}))}

    def choose(trial: Any, question: str, time: int) -> str:
        if question == "quality":
            return right(trial, "bridged" if time == 0 else "raw")
        return right(trial, ("bridged", "bridged", "bridged", "tie", "raw")[items[trial["item"]]])

    found = scored(pairs, answer(pairs, "a", choose), answer(pairs, "b", choose))
    assert (found.participants, found.items, found.trials) == (2, 5, 10)
    fit, quality = found.preferences
    assert (fit.question, fit.systems) == ("fit", ("raw", "bridged"))
    assert fit.share.estimate == pytest.approx(0.7)
    assert (fit.answers.above, fit.answers.below, fit.answers.ties) == (6, 2, 2)
    assert fit.answers.p == pytest.approx(binomtest(6, 8).pvalue)
    assert fit.items == (3, 1, 1, pytest.approx(binomtest(3, 4).pvalue))
    assert fit.participants == (2, 0, 0, pytest.approx(0.5))
    assert quality.share.estimate == 1.0 and quality.answers == (10, 0, 0, pytest.approx(2 / 2**10))
    assert 0 <= fit.share.low < 0.7 < fit.share.high <= 1
    for one in found.listeners:
        assert (one.checks, one.failed, one.excluded) == (4, 0, False)
        assert (one.minutes, one.plays) == (4.5, 36)
        assert (one.repeats, one.agreement) == (4, 0.5)  # fit was the same again, quality the other way


def read_items(folder: Path) -> list[Any]:
    return list(json.loads((folder / KEY).read_text())["trials"])


def test_first_side_is_counted(pairs: Path) -> None:
    def first(trial: Any, *_: object) -> str:
        return right(trial, next(iter(trial["stimuli"].values())))

    found = scored(pairs, answer(pairs, "a", first))
    assert [one.first_side for one in found.preferences] == [1.0, 1.0]
    assert found.listeners[0].agreement == 0.0


def test_who_fails_the_checks_is_not_counted(pairs: Path) -> None:
    good = answer(pairs, "good", lambda trial, *_: right(trial, "bridged"))
    guessing = answer(pairs, "guessing", lambda trial, *_: FOIL if trial["catch"] else "raw")
    found = scored(pairs, good, guessing)
    assert found.participants == 1 and found.preferences[0].share.estimate == 1.0
    assert [(one.participant, one.failed, one.excluded) for one in found.listeners] == [
        ("good", 0, False),
        ("guessing", 4, True),
    ]
    text = markdown(found)
    assert "1 participant, 5 items, 5 trials; excluded, more than 15% of checks with a known answer: guessing" in text
    with pytest.raises(ValueError, match="no participant is left: guessing"):
        scored(pairs, guessing)


BASE = {"reference": 100, "bridged": 60, "raw": 40, "anchor 3.5 kHz": 20, "anchor 7 kHz": 70}


@pytest.fixture
def mushra(tmp_path: Path) -> Path:
    write_test(make_set(tmp_path / "set", count=8), tmp_path / "page", Settings("mushra", repeats=1))
    return tmp_path / "page"


def test_mushra_scores(mushra: Path) -> None:
    def rate(shift: int) -> Answer:
        return lambda trial, system, time: (
            BASE[system] + (shift + int(trial["item"][:4]) - 6 * time) * (system in ("bridged", "raw"))
        )

    found = scored(mushra, answer(mushra, "a", rate(0)), answer(mushra, "b", rate(10)))
    means = {one.system: one.mean.estimate for one in found.ratings}
    assert means == {**BASE, "bridged": 60 + 3.5 + 5, "raw": 40 + 3.5 + 5}
    assert {one.system: one.median for one in found.ratings}["bridged"] == 68.5
    by = {one.systems: one for one in found.comparisons}
    assert list(by) == [("reference", "bridged"), ("reference", "raw"), ("bridged", "raw")]
    assert by["bridged", "raw"].difference == (20, 20, 20)  # by the same listener for the same item
    assert by["bridged", "raw"].answers == (16, 0, 0, pytest.approx(2 / 2**16))
    bridged = next(one.mean for one in found.ratings if one.system == "bridged")
    assert bridged.low < 64 and bridged.high > 73  # the listeners' shift of 10 is in the interval
    assert [one.agreement for one in found.listeners] == [pytest.approx(2 * 6 / 5)] * 2
    assert (found.trials, found.listeners[0].checks) == (16, 9)


@pytest.mark.parametrize(("low", "excluded"), [(1, False), (2, True)])
def test_hidden_references_rated_low(mushra: Path, low: int, excluded: bool) -> None:
    """1 of 9 is 11 %, 2 of 9 are 22 %; exactly 90 is not below 90."""
    marked = [trial["id"] for trial in read_items(mushra)][:low]

    def rate(trial: Any, system: str, time: int) -> float:
        return (89 if trial["id"] in marked else 90) if system == "reference" else BASE[system]

    good = answer(mushra, "good", lambda trial, system, time: BASE[system])
    found = scored(mushra, good, answer(mushra, "b", rate))
    assert [(one.participant, one.failed, one.excluded) for one in found.listeners] == [
        ("b", low, excluded),
        ("good", 0, False),
    ]
    assert found.participants == 2 - excluded


def test_a_single_rating_has_no_interval(tmp_path: Path) -> None:
    write_test(make_set(tmp_path / "set", count=1), tmp_path / "page", Settings("mushra", repeats=0))
    found = scored(tmp_path / "page", answer(tmp_path / "page", "a", lambda trial, system, time: BASE[system]))
    assert as_json(found)["ratings"][0]["mean"] == {"estimate": 100.0, "low": None, "high": None}
    assert "| reference | 100.0 – | 100.0 |" in markdown(found)


def damaged(content: dict[str, Any], damage: str) -> Any:
    trials = content["trials"]
    changes: dict[str, Callable[[], Any]] = {
        "page": lambda: content.update(digest="0" * 64),
        "format": lambda: content.update(format="diffgap-listening-answers/2"),
        "list": lambda: [content],
        "lacking": lambda: trials.pop(),
        "twice": lambda: trials.append(trials[0]),
        "replaced": lambda: trials.__setitem__(1, trials[0]),
        "unknown": lambda: trials[0].update(trial="../../etc/passwd"),
        "order": lambda: trials[0].update(order=trials[0]["order"][:1] * 2),
        "unheard": lambda: trials[0]["plays"].popitem(),
        "unanswered": lambda: trials[0]["answers"].popitem(),
        "other sound": lambda: trials[0]["answers"].update(fit="000000000000"),
        "a list": lambda: trials[0]["answers"].update(fit=[]),
        "participant": lambda: content.update(participant="../a|b"),
        "no participant": lambda: content.update(participant=None),
        "seconds": lambda: trials[0].update(seconds="long"),
        "trials": lambda: content.update(trials=7),
    }
    result = changes[damage]()
    return result if damage == "list" else content


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("page", "answers another page"),
        ("format", "is of format 'diffgap-listening-answers/2'"),
        ("list", "is of format None"),
        ("lacking", "8 trials, and not each of the page's 9 once"),
        ("twice", "10 trials, and not each"),
        ("replaced", "9 trials, and not each"),
        ("unknown", "not each of the page's 9 once"),
        ("order", "showed other sounds"),
        ("unheard", "before each sound was heard"),
        ("unanswered", "whole answers"),
        ("other sound", "an answer that the page does not offer"),
        ("a list", "whole answers"),
        ("participant", "participant '../a|b'"),
        ("no participant", "whole answers"),
        ("seconds", "whole answers"),
        ("trials", "whole answers"),
    ],
)
def test_damaged_answers(pairs: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str) -> None:
    file = answer(pairs, "a", lambda trial, *_: right(trial, "raw"))
    file.write_text(json.dumps(damaged(json.loads(file.read_text()), damage)))
    assert run("listen", "--score", file, "--key", pairs) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1 and "answers-a.json" in complaint


def test_ties_only_where_they_are_offered(generated: GeneratedSet, tmp_path: Path) -> None:
    write_test(generated, tmp_path / "page", Settings())
    file = answer(tmp_path / "page", "a", lambda trial, *_: right(trial, "tie"))
    with pytest.raises(ValueError, match="does not offer"):
        scored(tmp_path / "page", file)


@pytest.mark.parametrize("value", [101, -1, "50", True, None])
def test_scores_outside_of_the_scale(mushra: Path, value: Any) -> None:
    file = answer(mushra, "a", lambda trial, system, time: value if system == "raw" else 95)
    with pytest.raises(ValueError, match="scores outside of 0 to 100"):
        scored(mushra, file)


def test_files_that_are_none(pairs: Path, tmp_path: Path) -> None:
    key = read_key(pairs)
    with pytest.raises(FileNotFoundError, match="does not exist; --score"):
        read_sessions([tmp_path / "nothing.json"], key)
    (tmp_path / "text.json").write_text("[")
    with pytest.raises(ValueError, match="is no JSON"):
        read_sessions([tmp_path / "text.json"], key)
    file = answer(pairs, "a", lambda trial, *_: right(trial, "raw"))
    (tmp_path / "copy.json").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="both of participant a; give one of them"):
        read_sessions([file, tmp_path / "copy.json"], key)
    with pytest.raises(ValueError, match="no answers to score"):
        score(key, [])
    with pytest.raises(FileNotFoundError, match=r"--key takes the key\.json"):
        read_key(tmp_path / "set")
    with pytest.raises(ValueError, match="is of format 'diffgap-listening-answers/1'"):
        read_key(file)
    content = json.loads((pairs / KEY).read_text())
    del content["trials"][0]["stimuli"]
    (tmp_path / "key.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a whole key"):
        read_key(tmp_path / "key.json")
    assert isinstance(key, Key)


def test_the_command(generated: GeneratedSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page"
    assert run("listen", generated.folder, "-o", page, "--trials", 4, "--repeats", 1, "--catch", 1, "--ties") == 0
    said = capsys.readouterr().out
    assert "6 trials of raw, bridged" in said and "key.json" in said
    assert sorted(file.name for file in page.iterdir()) == ["key.json", "listen.html"]
    files = [answer(page, name, lambda trial, *_: right(trial, "bridged")) for name in ("a", "b")]
    assert run("listen", "--score", *files, "--key", page / KEY, "-o", tmp_path / "result") == 0
    said = capsys.readouterr().out
    assert "2 participants, 4 items, 8 trials" in said and "Preferences" in said
    text = (tmp_path / "result" / "report.md").read_text()
    assert "## Preferences for bridged over raw" in text
    assert "| fit | 100.0% [67.6%, 100.0%] | 8 : 0 | 0 | " in text and "| fit | 0.008 | 0.500 | 0.125 |" in text
    report = json.loads((tmp_path / "result" / "report.json").read_text())
    assert report["preferences"][0]["answers"] == {"above": 8, "below": 0, "ties": 0, "p": 2 / 2**8}
    assert report["preferences"][0]["share"]["estimate"] == 1.0
    assert run("listen", "--score", files[0], "--key", page, "-o", tmp_path / "result") == 0  # replaces a report
    assert run("listen", "--score", files[0], "--key", page, "-o", page) == 2
    assert "exists and is not a report" in capsys.readouterr().err


def test_bad_commands(generated: GeneratedSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([], "give a SET"),
        ([generated.folder], "-o FOLDER"),
        ([generated.folder, "-o", tmp_path / "page", "--key", tmp_path], "no --key"),
        ([generated.folder, "-o", tmp_path / "page", "--score", tmp_path / "a.json"], "give a SET"),
        (["--score", tmp_path / "a.json"], "--score needs --key"),
        ([tmp_path / "nowhere", "-o", tmp_path / "page"], "holds no set.json"),
        ([generated.folder, "-o", tmp_path / "set"], "choose another folder"),
    ):
        assert run("listen", *arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
