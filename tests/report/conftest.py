"""A small trained bridge with its evaluation and diagnosis, a generator's run, and a set of sounds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.generation.generated import GeneratedItem, GeneratedSet
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig
from tests.helpers import run
from tests.synthetic import make_config, make_store, with_bridge

RATE = 8000
HOSTILE = "\"><script>document.title = 'taken'</script><img src=x onerror=alert(1)> & 'rain' $title"
SYSTEMS = ("reference", "bridged", "raw")


@dataclass(frozen=True)
class Workshop:
    """Folders: the run with eval/ and diagnose/, the same run without, a generator's run, a set of sounds."""

    run: Path
    plain: Path
    generator: Path
    set: Path

    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.run.parent / "store")


def tone(hertz: float, seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)


def make_set(folder: Path, items: int = 5, seconds: float = 0.4) -> GeneratedSet:
    """Tones: of item i, 300 + 100 i Hz; the first caption is hostile, the second is missing."""
    captions = {0: HOSTILE, 1: ""}
    made = tuple(
        GeneratedItem(f"clip{i}", f"id{i}", captions.get(i, f"sound {i}"), "tones", seconds + 0.1 * i)
        for i in range(items)
    )
    for number, system in enumerate(SYSTEMS):
        (folder / system).mkdir(parents=True)
        for i, item in enumerate(made):
            wave = tone(300 + 100 * i, item.seconds) / (number + 1)
            soundfile.write(folder / system / f"{item.name}.wav", wave, RATE, subtype="FLOAT")
    found = GeneratedSet(
        folder, RATE, "text", SYSTEMS, made, {"generator": "<i>tiny</i>", "seed": 3, "steps": None, "label": ""}
    )
    found.write()
    return found


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("report")
    write_store(folder / "store", make_store(groups=60))
    # Samples take several steps, so that there is a way to show.
    config = with_bridge(make_config(folder / "store", steps=8), sampling_steps=4)
    config.save(folder / "run.yaml")
    assert run("train", folder / "run", "--config", folder / "run.yaml") == 0
    shutil.copytree(folder / "run", folder / "plain")
    assert run("eval", folder / "run", "--bootstrap", 50) == 0
    assert run("diagnose", folder / "run") == 0
    generator = folder / "generator"
    generator.mkdir()
    settings = GeneratorRunConfig(data=GeneratorData(path="sounds", bridge=str(folder / "run")))
    replace(settings, train=replace(settings.train, steps=4)).save(generator / "config.yaml")
    lines = [{"step": step, "loss": 1 / step, "grad_norm": 0.5} for step in range(1, 5)]
    lines[1] |= {"val/score": -0.75, "val/loss": 0.75, "val/shuffled": 1.25}
    lines[3] |= {"val/score": -0.875, "val/loss": 0.875, "val/shuffled": 1.5}
    (generator / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Workshop(folder / "run", folder / "plain", generator, make_set(folder / "set").folder)
