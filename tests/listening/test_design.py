"""Plans of tests: balanced, blind, the same again."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffgap.generation.generated import GeneratedSet
from diffgap.listening.design import FOIL, Plan, Settings, plan
from diffgap.listening.page import KEY, PAGE, write_test
from tests.listening.conftest import HOSTILE, RATE, make_set

ALL = ("reference", "vocoder", "audio", "bridged", "raw", "none")


def data_of(page: str) -> dict[str, Any]:
    """What the page holds for its script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def sides(planned: Plan, catch: bool) -> Counter[str]:
    """How often each system is the first of a trial."""
    return Counter(trial.stimuli[0].system for trial in planned.trials if trial.catch is catch)


@pytest.mark.parametrize("seed", range(5))
def test_every_system_is_as_often_first(tmp_path: Path, seed: int) -> None:
    found = make_set(tmp_path / "set", count=12)
    planned = plan(found, Settings(trials=8, repeats=2, catch=4, seed=seed))
    assert sides(planned, False) == {"raw": 5, "bridged": 5}
    assert sides(planned, True) == {"reference": 2, FOIL: 2}
    for block in planned.blocks:
        assert len(block) == 2 and block[0].catch == block[1].catch
        assert block[0].stimuli[0].system == block[1].stimuli[1].system or block[0].catch
    repeated = [block for block in planned.blocks if block[0].item == block[1].item]
    assert len(repeated) == 2
    assert all(one.stimuli == two.stimuli[::-1] and one.id != two.id for one, two in repeated)


def test_an_odd_trial_takes_either_side(tmp_path: Path) -> None:
    found = make_set(tmp_path / "set", count=3)
    first = {sides(plan(found, Settings(repeats=0, catch=0, seed=seed)), False)["raw"] for seed in range(20)}
    assert first == {1, 2}


def test_catch_trials_have_an_answer(tmp_path: Path) -> None:
    found = make_set(tmp_path / "set", count=10)
    planned = plan(found, Settings(trials=5, catch=3))
    caught = [trial for trial in planned.trials if trial.catch]
    assert len(caught) == 3
    for trial in caught:
        own, foil = sorted(trial.stimuli, key=lambda one: one.system == FOIL)
        assert own.item == trial.item and foil.item.caption != own.item.caption and foil.item.label != own.item.label
    compared = {trial.item for trial in planned.trials if not trial.catch}
    assert not compared & {trial.item for trial in caught}


def test_mushra_has_reference_and_anchors(tmp_path: Path) -> None:
    planned = plan(make_set(tmp_path / "set", ALL), Settings("mushra", repeats=1))
    assert planned.systems == (*ALL, "anchor 3.5 kHz", "anchor 7 kHz")
    assert [len(block) for block in planned.blocks] == [2, 1, 1, 1, 1]
    for trial in planned.trials:
        assert sorted(one.system for one in trial.stimuli) == sorted(planned.systems)
        assert trial.reference is not None and trial.reference.system == "reference"
        assert trial.reference not in trial.stimuli
    assert len({tuple(one.system for one in trial.stimuli) for trial in planned.trials}) > 1


@pytest.mark.parametrize("method", ["ab", "mushra"])
def test_the_page_tells_nothing(tmp_path: Path, method: Any) -> None:
    found = make_set(tmp_path / "set", ALL)
    write_test(found, tmp_path / "page", Settings(method))
    page, key = ((tmp_path / "page" / name).read_text() for name in (PAGE, KEY))
    data = data_of(page)
    opaque = {trial["id"] for block in data["blocks"] for trial in block} | set(data["sounds"])
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in opaque)
    assert data["blocks"][0][0].keys() == {"id", "caption", "stimuli", "reference"}
    shown = {trial["caption"] for block in data["blocks"] for trial in block}
    rest = json.dumps({**data, "blocks": 0, "sounds": 0, "questions": 0})
    assert not any(system in rest for system in (*ALL, "anchor", FOIL))
    assert shown == {item.caption for item in found.items}
    assert found.items[0].name not in page and "row0" not in page
    assert {name for trial in json.loads(key)["trials"] for name in trial["stimuli"]} <= set(data["sounds"])
    # Sounds stand in the order of their opaque names, and so do not give away which belongs to which system.
    assert list(data["sounds"]) == sorted(data["sounds"])


def test_sounds_are_those_of_the_key(generated: GeneratedSet, tmp_path: Path) -> None:
    write_test(generated, tmp_path / "page", Settings(catch=0))
    data = data_of((tmp_path / "page" / PAGE).read_text())
    numbers = {item.name: number for number, item in enumerate(generated.items)}
    for trial in json.loads((tmp_path / "page" / KEY).read_text())["trials"]:
        for name, system in trial["stimuli"].items():
            wave = np.frombuffer(base64.b64decode(data["sounds"][name]), "<i2")
            pitch = np.argmax(np.abs(np.fft.rfft(wave))) * RATE / len(wave)
            expected = 200 + 40 * numbers[trial["item"]] + 300 * generated.systems.index(system)
            assert pitch == pytest.approx(expected, abs=4)


def test_the_same_again(generated: GeneratedSet, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_test(generated, tmp_path / folder, Settings(seed=seed))
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in (PAGE, KEY)] for folder in "abc")
    assert a == b
    assert data_of(a[0].decode())["digest"] != data_of(c[0].decode())["digest"]


def test_a_caption_cannot_leave_its_place(generated: GeneratedSet, tmp_path: Path) -> None:
    write_test(generated, tmp_path / "page", Settings())
    page = (tmp_path / "page" / PAGE).read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
    assert HOSTILE in {trial["caption"] for block in data_of(page)["blocks"] for trial in block}


def test_an_existing_folder_is_kept(generated: GeneratedSet, tmp_path: Path) -> None:
    write_test(generated, tmp_path / "page", Settings())
    before = (tmp_path / "page" / KEY).read_bytes()
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_test(generated, tmp_path / "page", Settings(seed=1))
    assert (tmp_path / "page" / KEY).read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(systems=("raw",)), "two different ones"),
        (Settings(systems=("raw", "raw")), "two different ones"),
        (Settings(systems=("raw", "none")), "holds no system none; it has reference, bridged, raw"),
        (Settings(systems=("raw", "../x")), "unknown system '../x'; choose from reference"),
        (Settings(trials=0), "trials is 0"),
        (Settings(repeats=6), "repeats is 6"),
        (Settings(repeats=-1), "repeats is -1"),
        (Settings(catch=-1), "catch is -1"),
        (Settings(seed=-1), "seed is -1"),
        (Settings(questions=("taste",)), "choose from fit, quality"),
        (Settings(questions=("fit", "fit")), "each once"),
        (Settings(anchors=(3500.0,)), "--anchors has no meaning with --method ab"),
        (Settings("mushra", ties=True), "--ties has no meaning with --method mushra"),
        (Settings("mushra", catch=1), "--catch has no meaning"),
        (Settings("mushra", anchors=(8000.0,)), "8000 Hz is not between 100 Hz and half the sample rate, 8000 Hz"),
        (Settings("mushra", anchors=(1000.0, 1000.0)), "twice"),
        (Settings("abx"), "choose ab or mushra"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(generated: GeneratedSet, tmp_path: Path, settings: Settings, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        write_test(generated, tmp_path / "page", settings)
    assert not (tmp_path / "page").exists()


def test_sets_that_do_not_suit(tmp_path: Path) -> None:
    bare = make_set(tmp_path / "bare", ("bridged", "raw"))
    with pytest.raises(ValueError, match=r"holds no system reference .*pass --catch 0"):
        plan(bare, Settings())
    assert plan(bare, Settings(catch=0)).systems == ("raw", "bridged")
    with pytest.raises(ValueError, match="MUSHRA compares with it"):
        plan(bare, Settings("mushra"))
    single = make_set(tmp_path / "single", count=1)
    with pytest.raises(ValueError, match="pass --catch 0"):
        plan(single, Settings(repeats=0))
    mute = GeneratedSet(
        single.folder, RATE, "image", single.systems, (type(single.items[0])("0000-clip", "a", "", "", 0.3),), {}
    )
    with pytest.raises(ValueError, match="--questions quality"):
        plan(mute, Settings(repeats=0, catch=0))
    assert plan(mute, Settings(repeats=0, catch=0, questions=("quality",))).questions == ("quality",)
